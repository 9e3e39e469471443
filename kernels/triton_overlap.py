"""Beginning a kernel while the one before it still runs, on GPUs that can (compute capability 9 and later).

Rule: nothing that an earlier kernel writes is read, and nothing at all is written, before `after_previous`. What may
come before it is weights: they are brought nearer while the last programs of the kernel before finish.

A launch costs about a microsecond in which memory idles, and a decode step of a small model is little else. With
OVERLAP the next kernel's programs start where there is room as soon as all of this one's have come to `let_next_begin`.
They wait in `after_previous` until every kernel before has ended and what it wrote is visible. A program that lets the
next begin has little left to do: were it at its beginning, the next kernel's programs would crowd the multiprocessors
that are free first.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait for the end of the previous kernel."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """This program does not mind if the next kernel begins."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def bring_nearer(pointers, mask, OVERLAP: tl.constexpr):
    """Ask for the 128 bytes around each pointer to be fetched into the L2 cache. Nothing waits for them."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
