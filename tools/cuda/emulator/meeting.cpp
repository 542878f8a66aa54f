// Threads together: the barrier of a block, and the meetings of the lanes of a warp.
#include "order.h"

namespace cuda_on_cpu {

// Two of each, used in turn: who is early in one must not be taken for one who was in the last.
static Order barrier_order[2];
static std::vector<Order> warp_order;  // __syncwarp uses those of the lowest lane of its mask
static unsigned arrived_at_barrier;
static unsigned long long barriers;
static int sum;  // of a barrier that counts

void begin_meetings() {
    arrived_at_barrier = 0;
    warps.assign((count + WARP - 1) / WARP, Warp());
#ifdef CHECK_THREAD
    warp_order.assign(2 * WARP * warps.size(), Order());
#endif
}

static void finish_barrier() {
    const Thread& first = threads[0];
    for (Thread& t : threads) {
        if (!(t.place == first.place))
            fail("%s waits in %s and %s in %s: one barrier, two places", who(first).text,
                 where(first.place).text, who(t).text, where(t.place).text);
        t.counted = sum;
        wake(t);
    }
    arrived_at_barrier = 0;
    barriers++;
}

int barrier(Count how, int value, const char* name, const char* file, int line) {
    Thread& self = *current;
    Order& order = barrier_order[barriers % 2];
    self.place = {name, file, line};
    self.state = AT_BARRIER;
    sum = (arrived_at_barrier ? sum : 0) + (how == COUNT_AND ? value == 0 : value != 0);
    order.release();
    if (++arrived_at_barrier == count) finish_barrier();
    stop(self.state);
    order.acquire();
    return how == COUNT_AND ? self.counted == 0 : how == COUNT_OR ? self.counted != 0 : self.counted;
}

// The lane whose value this one gets: PTX's shfl.sync, refused where it would cut its operand to five bits.
static unsigned source_lane(Meeting kind, unsigned lane, int b, unsigned width) {
    unsigned first = lane & ~(width - 1), last = first + width - 1;
    if (kind == SHUFFLE_IDX) {
        if (b < 0 || b >= int(width)) fail("%s shuffles from lane %d of %u", who(*current).text, b, width);
        return first + b;
    }
    if (b < 0 || b >= int(WARP)) fail("%s shuffles by %d lanes, of a warp of 32", who(*current).text, b);
    if (kind == SHUFFLE_UP) return lane >= first + b ? lane - b : lane;
    unsigned from = kind == SHUFFLE_DOWN ? lane + b : lane ^ unsigned(b);
    return from <= last ? from : lane;
}

static bool is_shuffle(Meeting kind) { return kind >= SHUFFLE_IDX && kind <= SHUFFLE_XOR; }

// Whether all lanes of the mask are in this meeting, now that `self` is.
static bool complete(const Thread& self, Warp& warp) {
    unsigned bit = 1u << self.number % WARP;
    if (!warp.waiting) {
        warp.meeting = self.meeting;
        warp.mask = self.mask;
        warp.mixed = false;
    }
    warp.waiting |= bit;
    warp.mixed |= warp.meeting != self.meeting || warp.mask != self.mask;
    if (self.mask & ~warp.waiting) return false;
    for (unsigned lane = 0; lane < WARP && warp.mixed; lane++) {
        const Thread* t = self.mask >> lane & 1 ? lane_of(self, lane) : nullptr;
        if (t && (t->meeting != self.meeting || t->mask != self.mask)) return false;
    }
    return true;
}

static void finish_meeting(const Thread& self, Warp& warp) {
    Thread* lanes = &threads[self.number / WARP * WARP];
    unsigned long long ballot = 0;
    char together[WARP * MOST_GATHERED];
    for (unsigned lane = 0; lane < WARP && self.meeting == GATHER; lane++)
        copy(together + lane * self.size, static_cast<const char*>(lanes[lane].mine), self.size);
    for (unsigned rest = self.mask; rest; rest &= rest - 1) {
        Thread& t = lanes[__builtin_ctz(rest)];
        if (self.meeting == BALLOT) ballot |= t.value ? rest & -rest : 0;
        if (self.meeting == GATHER) copy(t.all, together, WARP * t.size);
        if (is_shuffle(self.meeting)) {
            if (!(t.mask >> t.source & 1))
                fail("%s reads lane %u in %s, which the mask %08x does not name", who(t).text, t.source,
                     where(t.place).text, t.mask);
            t.result = lanes[t.source].value;
        }
    }
    for (unsigned rest = self.mask; rest; rest &= rest - 1) {
        Thread& t = lanes[__builtin_ctz(rest)];
        if (self.meeting == BALLOT) t.result = ballot;
        wake(t);
    }
    warp.waiting &= ~self.mask;
}

unsigned long long meet(Meeting kind, unsigned mask, unsigned long long value, int operand, int width,
                        const char* name, const char* file, int line) {
    Thread& self = *current;
    Warp& warp = warps[self.number / WARP];
    unsigned lane = self.number % WARP, lanes = count - self.number / WARP * WARP;
    self.place = {name, file, line};
    if (!(mask >> lane & 1))
        fail("%s, lane %u, is not in its own mask %08x in %s", who(self).text, lane, mask,
             where(self.place).text);
    if (lanes < WARP && mask >> lanes)
        fail("%s: the mask %08x in %s names lanes that a warp of %u threads has not", who(self).text, mask,
             where(self.place).text, lanes);
    if (width < 1 || width > int(WARP) || width & (width - 1))
        fail("%s: the width %d in %s is not a power of two up to 32", who(self).text, width,
             where(self.place).text);
    self.meeting = kind;
    self.mask = mask;
    self.value = value;
    self.state = IN_WARP;
    if (is_shuffle(kind)) self.source = source_lane(kind, lane, operand, width);
    Order* order = nullptr;
#ifdef CHECK_THREAD
    if (kind == SYNCWARP)  // alone among the meetings it orders memory
        order = &warp_order[2 * (self.number - lane + __builtin_ctz(mask)) + self.met++ % 2];
#endif
    if (order) order->release();
    if (complete(self, warp)) finish_meeting(self, warp);
    stop(self.state);
    if (order) order->acquire();
    return self.result;
}

void gather(const void* mine, void* all, size_t size, const char* file, int line) {
    current->mine = mine;
    current->all = static_cast<char*>(all);
    current->size = size;
    meet(GATHER, 0xffffffffu, 0, 0, WARP, "an operation of the whole warp", file, line);
}

}  // namespace cuda_on_cpu
