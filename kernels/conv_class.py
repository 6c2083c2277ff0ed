"""Classes of convolutions, which the tables of what was measured go by."""


def class_of(weight_size, stride, dilation, groups: int) -> str:
    """Window, stride, dilation, grouping and width, such as ``3x3/2 c128``: convolutions that
    differ in map and batch only are of one class, and so are those of up to twice the width, which
    is that of the narrower side of a group."""
    filters, channels, *taps = weight_size
    name = "x".join(str(t) for t in taps)
    if tuple(stride) != (1, 1):
        name += "/" + "x".join(dict.fromkeys(str(s) for s in stride))
    if tuple(dilation) != (1, 1):
        name += " dilated"
    if groups > 1:
        name += " grouped"
    return f"{name} c{1 << (min(channels, filters // groups).bit_length() - 1)}"
