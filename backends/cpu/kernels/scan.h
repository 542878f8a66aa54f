// Return the time step of a position and head: softplus, clipped to its limits.
#pragma once
#include <algorithm>
#include <cmath>

static inline float time_step(float raw, float low, float high) {
    const float step = raw > 20 ? raw : log1pf(expf(raw));
    return std::min(std::max(step, low), high);
}
