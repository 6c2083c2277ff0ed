"""What becomes of a tile's sums: bias, statistics, batch norm, residual, ReLU, store."""

import triton
import triton.language as tl


@triton.jit
def finish(
    acc,  # (BLOCK_M, BLOCK_N)
    y,  # (pixels, K)
    bias,  # (K,) or None
    mean,  # (K,) or None: with variance, scale and shift a batch norm in eval
    variance,  # (K,) or None
    scale,  # (K,) or None
    shift,  # (K,) or None
    residual,  # (pixels, K) or None
    means,  # (tiles of pixels, K) or None
    squares,  # (tiles of pixels, K) or None
    counts,  # (tiles of pixels,) or None
    m,  # tile of pixels
    pixel,  # (BLOCK_M,)
    inside,  # (BLOCK_M,) whether there is such a pixel
    count,  # of those that there are
    k,  # (BLOCK_N,) filters
    k_known,  # (BLOCK_N,)
    filters,
    eps,
    RELU: tl.constexpr,
):
    """``act(norm(acc + bias) + residual)``.

    ``means`` and ``squares`` get the mean of a tile's pixels and the sum of squared deviations from
    it, of ``acc + bias`` in fp32, before it is rounded; ``counts`` their number.
    """
    if bias is not None:
        acc += tl.load(bias + k, mask=k_known, other=0).to(tl.float32)[None, :]
    if means is not None:
        average = tl.sum(tl.where(inside[:, None], acc, 0), 0) / count.to(tl.float32)
        deviation = tl.where(inside[:, None], acc - average[None, :], 0)
        # a second look, not a sum of squares: a mean of 1e4 would drown a deviation of 1
        square = tl.sum(deviation * deviation, 0)
        tl.store(means + m * filters + k, average, mask=k_known)
        tl.store(squares + m * filters + k, square, mask=k_known)
        tl.store(counts + m, count.to(tl.float32))  # by every block of filters the same
    if variance is not None:
        factor = 1 / tl.sqrt(tl.load(variance + k, mask=k_known, other=1).to(tl.float32) + eps)
        if scale is not None:
            factor *= tl.load(scale + k, mask=k_known, other=0).to(tl.float32)
        acc -= tl.load(mean + k, mask=k_known, other=0).to(tl.float32)[None, :]
        acc *= factor[None, :]
        if shift is not None:
            acc += tl.load(shift + k, mask=k_known, other=0).to(tl.float32)[None, :]
    place = pixel.to(tl.int64)[:, None] * filters + k[None, :]
    known = inside[:, None] & k_known[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=known, other=0).to(tl.float32)
    if RELU:
        acc = tl.where(acc <= 0, 0, acc)  # NaN stays
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=known)
