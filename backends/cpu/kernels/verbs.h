// The functions that Python calls, each explained at its definition. Every file that defines one includes this header,
// so that the compiler compares declaration and definition.
#pragma once
#include <cstdint>

#include "structures.h"

extern "C" {
// products.cpp
void linear(const Matrix& w, i64 outs, i64 n, const float* x, i64 rows, float* y, i64 y_step, const Run& run);
void mlp(const Matrix& up, const Matrix& down, i64 width, i64 d, const float* h, i64 rows, float* y,
         const Run& run);
void experts(const Matrix* up, const Matrix* down, i64 base, i64 count, const i64* expert, const float* weight,
             i64 tokens, i64 k, i64 n, i64 width, const float* u, float* y,
             const Run& run);
// norms.cpp
void rms_norm(const float* x, const float* delta, const float* w, float eps, float* y, float* total, i64 rows,
              i64 d, const Run& run);
void gated_rms_norm(const float* y, const float* z, i64 z_step, const float* w, float eps, float* out,
                    i64 rows, i64 groups, i64 c, const Run& run);
void conv(const float* x, i64 x_step, const float* w, const float* bias, const float* tail, const i64* real,
          float* y, float* next, i64 b, i64 l, i64 c, i64 k, const Run& run);
void choose(const float* logits, const float* bias, i64 rows, i64 count, i64 k, i64 groups, i64 kept,
            int normalise, float factor, i64* expert, float* weight, const Run& run);
// scan.cpp
void scan(const void* from, void* to, const uint32_t* key, const i64* read, const float* x, i64 x_step,
          const float* dt, i64 dt_step, const float* A_log, const float* B, i64 B_step, const float* C, i64 C_step,
          const float* D, const float* bias, const i64* real, float low, float high, float* y, i64 b, i64 l, i64 h,
          i64 p, i64 n, i64 g, i64 chunk, const Run& run);
// attention.cpp
void attend(const float* q, i64 q_step, const Cache& cache, const i64* length, float scale, float* y, i64 b, i64 l,
            i64 h, i64 kv, i64 e, const Run& run);
// mixers.cpp
void step(const Model& m, const Sequences& of, float* x, float* delta, const State* states, float* const* records,
          int (*reduce)(int), int last, float* hidden, float* out, double* taken, const Run& run);
// replay.cpp
void replay(const Model& m, const Sequences& of, const i64* kept, const float* const* records, const State* states,
            const Run& run);
// interface.cpp
const char* interface();
}
