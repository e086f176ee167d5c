/* Which branches of compiled code were taken. Code built with -fsanitize-coverage=trace-pc calls the first function at
 * each of them; the fuzzer preloads this file. */
#include <stdint.h>
#include <string.h>

#define CELLS (1u << 16)
static uint8_t now[CELLS];
static uint8_t ever[CELLS];
static uintptr_t before;

void __sanitizer_cov_trace_pc(void) {
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    uintptr_t edge = here ^ (before << 1);
    now[(edge ^ (edge >> 16)) % CELLS] = 1;
    before = here;
}

/* How many of the steps from one branch to another, since the last call, were never taken before. */
int fuzz_new_steps(void) {
    int found = 0;
    for (unsigned i = 0; i < CELLS; i++) {
        found += now[i] && !ever[i];
        ever[i] |= now[i];
    }
    memset(now, 0, sizeof now);
    before = 0;
    return found;
}
