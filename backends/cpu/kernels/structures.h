// Structures that Python fills in (interface.py). Each is a list of fields. Both the structure here and its description
// in interface.cpp are made from this list, so the description has every field.
#pragma once
#include <cstdint>

typedef int64_t i64;
typedef const float* Vector;

// Kinds of numbers of a matrix, with the values of arrays.py. From MXFP8 on they are packed (packed.h).
enum Kind : i64 {
    FLOAT32, FLOAT16, BFLOAT16, FLOAT8, MXFP8, NVFP4, GGUF_NVFP4, MXFP4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K,
    IQ4_NL,
};
constexpr i64 E4M3 = 8;                          // a kind of numbers of a cache only

// Options of a call. steady: the order of sums does not depend on the number of rows. planes: bytes of a number of x
// beside packed weights (packed.h), 2 or 3.
#define RUN(FIELD) FIELD(int, threads) FIELD(int, steady) FIELD(int, planes)

// scale: scales of blocks of columns, for MXFP8 and NVFP4 only. factor: one scale of the matrix, from FLOAT8 on.
#define MATRIX(FIELD) FIELD(const void*, at) FIELD(i64, kind) FIELD(const uint8_t*, scale) FIELD(float, factor)

#define NORM(FIELD) FIELD(Vector, weight) FIELD(i64, d) FIELD(float, eps)

#define MAMBA(FIELD)                                                                                         \
    FIELD(Norm, norm) FIELD(Matrix, in_proj) FIELD(Matrix, out_proj)                                         \
    FIELD(Vector, conv) FIELD(Vector, conv_bias) FIELD(Vector, A_log) FIELD(Vector, D)                       \
    FIELD(Vector, dt_bias) FIELD(Vector, gate)                                                               \
    FIELD(i64, heads) FIELD(i64, head_dim) FIELD(i64, groups) FIELD(i64, state) FIELD(i64, kernel)           \
    FIELD(float, low) FIELD(float, high)

// scale: log2(e) / sqrt(head_dim)
#define ATTENTION(FIELD)                                                                                     \
    FIELD(Norm, norm) FIELD(Matrix, q) FIELD(Matrix, k) FIELD(Matrix, v) FIELD(Matrix, o)                    \
    FIELD(i64, heads) FIELD(i64, kv) FIELD(i64, head_dim) FIELD(float, scale)

// fc1 and fc2: null if there is no latent. up, down: matrices of the experts; all up, and all down, are of one kind.
#define EXPERTS(FIELD)                                                                                       \
    FIELD(Norm, norm) FIELD(Vector, gate) FIELD(Vector, bias)                                                \
    FIELD(Matrix, shared_up) FIELD(Matrix, shared_down) FIELD(Matrix, fc1) FIELD(Matrix, fc2)                \
    FIELD(const Matrix*, up) FIELD(const Matrix*, down)                                               \
    FIELD(i64, count) FIELD(i64, chosen) FIELD(i64, groups) FIELD(i64, kept)                                 \
    FIELD(i64, width) FIELD(i64, shared_width) FIELD(i64, latent) FIELD(int, normalise) FIELD(float, factor)

#define DENSE(FIELD) FIELD(Norm, norm) FIELD(Matrix, up) FIELD(Matrix, down) FIELD(i64, width)

// kind: 'M' '*' 'E' '-'; weights: the structure of that kind
#define LAYER(FIELD) FIELD(i64, kind) FIELD(const void*, weights)

#define MODEL(FIELD)                                                                                         \
    FIELD(Norm, norm) FIELD(Matrix, head) FIELD(i64, vocabulary) FIELD(i64, count)                           \
    FIELD(const Layer*, layers)

// Keys and values of some positions of one sequence: [kv][..][e]; heads begin `step` numbers apart.
#define PAGE(FIELD) FIELD(void*, k) FIELD(void*, v) FIELD(i64, step)

// The cache of an attention layer: pages [b][count], each of `each` positions. All numbers are of one kind; E4M3 is
// multiplied by the scales.
#define CACHE(FIELD)                                                                                         \
    FIELD(const Page*, pages) FIELD(i64, count) FIELD(i64, each) FIELD(i64, kind) FIELD(float, k_scale)      \
    FIELD(float, v_scale)

// The state of a layer. Mamba: addresses of tail [k-1][c] and S [h][p][n] of each sequence; S is float32, or float16
// with a rounding key [b] and the number of positions read [b]. Attention: a Cache.
#define STATE(FIELD)                                                                                         \
    FIELD(float* const*, tail) FIELD(void* const*, S) FIELD(const Cache*, cache) FIELD(const uint32_t*, key) \
    FIELD(const i64*, read)

// The sequences of a call: count[b] positions of each (null: one), after length[b] earlier ones (null if the model has
// no attention). They follow each other in arrays of `rows` positions.
#define SEQUENCES(FIELD) FIELD(i64, b) FIELD(i64, rows) FIELD(const i64*, count) FIELD(const i64*, length)

#define MEMBER(type, name) type name;
struct Run { RUN(MEMBER) };
struct Matrix { MATRIX(MEMBER) };
struct Norm { NORM(MEMBER) };
struct Mamba { MAMBA(MEMBER) };
struct Attention { ATTENTION(MEMBER) };
struct Experts { EXPERTS(MEMBER) };
struct Dense { DENSE(MEMBER) };
struct Layer { LAYER(MEMBER) };
struct Model { MODEL(MEMBER) };
struct Page { PAGE(MEMBER) };
struct Cache { CACHE(MEMBER) };
struct State { STATE(MEMBER) };
struct Sequences { SEQUENCES(MEMBER) };
#undef MEMBER
