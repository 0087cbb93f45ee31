"""Verification by drawing: how far a request's drafts are what its rows drew (stem of csrc/cpu/verify.h)."""

import triton
import triton.language as tl


@triton.jit
def settle(drawn, row, width, drafts, tokens, status, accepted, ends, arrivals):
    """Once all rows of a request have drawn, the last of them to come says what is accepted and pads what follows.

    `drawn`: whether this program has drawn the row's token. The rows' tokens are read past the first cache, which
    another request's last row may have filled before they came.
    """
    if drawn:
        request = row // width
        tl.debug_barrier()
        if tl.atomic_add(arrivals + request, 1, sem="acq_rel") == width - 1:
            tl.store(arrivals + request, 0)
            first = request * width
            count = tl.full([], 0, tl.int64)
            going = tl.full([], 1, tl.int64)
            for i in range(width - 1):
                token = tl.load(tokens + first + i, volatile=True)
                right = (token >= 0) & (token == tl.load(drafts + request * (width - 1) + i))
                going = tl.where(right, going, 0)
                count += going
            tl.store(accepted + request, count.to(tl.int32))
            tl.store(ends + request, tl.load(status + first + count, volatile=True))
            for i in range(width):
                if i > count:
                    tl.store(tokens + first + i, tl.full([], -1, tl.int64))
