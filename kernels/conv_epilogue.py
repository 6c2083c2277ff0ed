"""What becomes of a tile's sums: in the convolution bias, statistics, batch norm, residual, ReLU; in
its gradient residual, the mask of the ReLU behind and the sums of the batch norm behind."""

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


@triton.jit
def finish_gradient(
    acc,  # (BLOCK_M, BLOCK_N)
    dx,  # (pixels, C)
    residual,  # (pixels, C) or None
    behind,  # (pixels, C) or None: what the BN behind normalised, or with
    mean,  # (C,) or None
    scale,  # (C,) or None
    shift,  # (C,) or None
    output,  # (pixels, C) or None: what the ReLU behind gave
    sums_g,  # (tiles of pixels, C) or None
    sums_gx,  # (tiles of pixels, C) or None
    m,  # tile of pixels
    pixel,  # (BLOCK_M,) int64
    inside,  # (BLOCK_M,) whether there is such a pixel
    c,  # (BLOCK_N,) channels
    c_known,  # (BLOCK_N,)
    channels,
    RELU: tl.constexpr,
):
    """``g = mask(acc + residual)``, and per tile the sums of g and of g * (behind - mean).

    With ``RELU`` the gradient is 0 where the ReLU behind gave 0: where ``output`` says so, else
    where ``(behind - mean) * scale + shift``, rounded as that was, does.
    """
    place = pixel[:, None] * channels + c[None, :]
    known = inside[:, None] & c_known[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=known, other=0).to(tl.float32)
    if behind is not None:
        x = tl.load(behind + place, mask=known, other=0)
        centred = x.to(tl.float32) - _row(mean, c, c_known)
        if RELU and output is None:
            before = tl.fma(centred, _row(scale, c, c_known), _row(shift, c, c_known))
            acc = tl.where(before.to(x.dtype).to(tl.float32) <= 0, 0, acc)
    if RELU and output is not None:
        y = tl.load(output + place, mask=known, other=0)
        acc = tl.where(y.to(tl.float32) <= 0, 0, acc)
    if sums_g is not None:
        g = tl.where(known, acc, 0)
        tl.store(sums_g + m * channels + c, tl.sum(g, 0), mask=c_known)
        gx = tl.where(known, g * centred, 0)
        tl.store(sums_gx + m * channels + c, tl.sum(gx, 0), mask=c_known)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=known)


@triton.jit
def _row(vector, c, known):
    return tl.load(vector + c, mask=known, other=0).to(tl.float32)[None, :]
