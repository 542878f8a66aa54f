// Sentences about what a kernel did wrong.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "order.h"

namespace cuda_on_cpu {

static char* sentence;
static size_t sentence_room;

void set_message(char* text, size_t room) {
    sentence = text;
    sentence_room = room;
    failed = false;
}

static void report(const char* format, va_list values) {
    if (failed) return;
    failed = true;
    int used = snprintf(sentence, sentence_room, "kernel %s: ", kernel->name);
    vsnprintf(sentence + used, sentence_room - used, format, values);
}

void report(const char* format, ...) {
    va_list values;
    va_start(values, format);
    report(format, values);
    va_end(values);
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    report(format, values);
    va_end(values);
    end_order.release();
    stop(ENDED);
    abort();
}

Text who(const Thread& t) {
    Text text;
    snprintf(text.text, sizeof text.text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.index.x, t.index.y,
             t.index.z, block_index.x, block_index.y, block_index.z);
    return text;
}

Text where(const Place& place) {
    Text text;
    const char* name = place.file;
    for (const char* c = place.file; *c; c++)
        if (*c == '/') name = c + 1;
    snprintf(text.text, sizeof text.text, "%s at %s:%d", place.name, name, place.line);
    return text;
}

// The first lane in the mask of a thread that waits, of which `wrong` holds.
template <class Wrong>
static bool report_lane(const char* format, Wrong wrong) {
    for (const Thread& t : threads) {
        if (t.state != IN_WARP) continue;
        for (unsigned lane = 0; lane < WARP; lane++) {
            const Thread* other = t.mask >> lane & 1 ? lane_of(t, lane) : nullptr;
            if (!other || !wrong(t, *other)) continue;
            report(format, who(t).text, where(t.place).text, t.mask, lane, who(*other).text,
                   other->place.file ? where(other->place).text : "", other->mask);
            return true;
        }
    }
    return false;
}

static const Thread* first(State state) {
    for (const Thread& t : threads)
        if (t.state == state) return &t;
    return nullptr;
}

// No thread can go on: which rule was broken, the surest first.
void report_deadlock() {
    if (report_lane("%s waits in %s with mask %08x for lane %u of its warp, which has ended",
                    [](const Thread&, const Thread& other) { return other.state == ENDED; }))
        return;
    const Thread *ended = first(ENDED), *barrier = first(AT_BARRIER), *warp = first(IN_WARP);
    if (barrier && warp)
        report("%s waits in %s while %s waits in %s: neither can go on", who(*barrier).text,
               where(barrier->place).text, who(*warp).text, where(warp->place).text);
    else if (barrier && ended)
        report("%s waits in %s, but %s ended before it", who(*barrier).text, where(barrier->place).text,
               who(*ended).text);
    else
        report_lane("%s waits in %s with mask %08x for lane %u, %s, which waits in %s with mask %08x",
                    [](const Thread& t, const Thread& other) {
                        return other.meeting != t.meeting || other.mask != t.mask;
                    });
}

}  // namespace cuda_on_cpu
