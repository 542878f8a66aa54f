// Describe the functions that Python calls and the structures that it fills, as text. Each line has a name, then the
// arguments or fields, separated by '|'. interface.py compares the text with its own tables when it loads the
// library.
#ifdef __GNUC__
#pragma GCC optimize "O0"  // runs once, so compile time counts
#endif
#include <cstddef>
#include <string>
#include <type_traits>

#include "verbs.h"

template <class T>
static std::string kind() {
    if (std::is_pointer<T>::value || std::is_reference<T>::value) return "pointer";
    if (std::is_same<T, i64>::value) return "int64";
    if (std::is_same<T, int>::value) return "int";
    if (std::is_same<T, float>::value) return "float";
    if (std::is_same<T, Norm>::value) return "Norm";
    if (std::is_same<T, Matrix>::value) return "Matrix";
    return "unknown";
}

template <class... Arguments>
static std::string arguments(void (*)(Arguments...)) {
    return (std::string() + ... + ("|" + kind<Arguments>()));
}

static std::string described() {
    std::string text;
#define FUNCTION(name) text += std::string("function " #name) + arguments(name) + "\n";
    FUNCTION(linear) FUNCTION(mlp) FUNCTION(experts) FUNCTION(rms_norm) FUNCTION(gated_rms_norm)
    FUNCTION(conv) FUNCTION(choose) FUNCTION(scan) FUNCTION(attend) FUNCTION(step) FUNCTION(replay)
#define FIELD(type, name) text += "|" #name " " + kind<type>() + " at " + std::to_string(offsetof(Here, name));
#define STRUCTURE(name, FIELDS)                                                                              \
    {                                                                                                        \
        using Here = name;                                                                                   \
        text += "structure " #name;                                                                          \
        FIELDS(FIELD)                                                                                        \
        text += "|" + std::to_string(sizeof(Here)) + " bytes\n";                                             \
    }
    STRUCTURE(Run, RUN) STRUCTURE(Matrix, MATRIX) STRUCTURE(Norm, NORM) STRUCTURE(Mamba, MAMBA)
    STRUCTURE(Attention, ATTENTION) STRUCTURE(Experts, EXPERTS)
    STRUCTURE(Dense, DENSE) STRUCTURE(Layer, LAYER) STRUCTURE(Model, MODEL)
    STRUCTURE(Page, PAGE) STRUCTURE(Cache, CACHE) STRUCTURE(State, STATE)
    STRUCTURE(Sequences, SEQUENCES)
    return text;
}

extern "C" const char* interface() {
    static const std::string text = described();
    return text.c_str();
}
