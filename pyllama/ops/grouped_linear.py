"""One matrix product per expert over sorted rows. M rows, D hidden size, F feed-forward size, E experts."""

import torch
from torch import Tensor

from pyllama.ops.checks import segment_lengths
from pyllama.ops.product import own_way, parts, pays, product, rows_first
from pyllama.ops.registry import cast, compute_dtype, op


def _rows_by_features(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None, *args: object) -> Tensor:
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], weight.shape[1])


def _backward(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    grads: list[Tensor],
    wanted: list[int],
) -> list[Tensor]:
    """Each gradient from its own products, without that of the forward, which none of them needs.

    That of scale[m] is x[rows[m]] @ (grad[m] @ weight[e]), and the product in brackets is that of x's gradient.
    """
    grad_MF, x_MD = grads[0], x if rows is None else x.index_select(0, rows)
    compute = compute_dtype(x)
    lengths = segment_lengths("grouped_linear", "offsets", offsets, x_MD.shape[0])

    def scaled(grad: Tensor) -> Tensor:
        return grad if scale is None else cast(cast(grad, compute) * cast(scale, compute).unsqueeze(1), x.dtype)

    def of_x() -> Tensor:
        return scaled(back_MD) if rows is None else x.new_zeros(x.shape).index_add_(0, rows, scaled(back_MD))

    def of_weight() -> Tensor:
        grad_EFD = weight.new_empty(weight.shape)
        for grad_FD, grad_mF, x_mD in zip(grad_EFD, scaled(grad_MF).split(lengths), x_MD.split(lengths), strict=True):
            torch.mm(grad_mF.T, x_mD, out=grad_FD)  # zeros, where there are no rows
        return grad_EFD

    def of_scale() -> Tensor:
        assert scale is not None
        return cast((cast(back_MD, compute) * cast(x_MD, compute)).sum(1), scale.dtype)

    if wanted != [1]:
        back_MD = x.new_empty(x_MD.shape)
        for weight_FD, grad_mF, back_mD in zip(weight, grad_MF.split(lengths), back_MD.split(lengths), strict=True):
            torch.mm(grad_mF, weight_FD, out=back_mD)
    return [{0: of_x, 1: of_weight, 4: of_scale}[i]() for i in wanted]


@op(
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? rows=None, Tensor? scale=None) -> Tensor",
    fake=_rows_by_features,
    backward=_backward,
    x="tokens D",
    weight="E F D",
    offsets="int32: E+1",
    rows="int32: M",
    scale="float: M",
)
def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Row m of the result is scale[m] * x[rows[m]] @ weight[e].T, with e the expert that owns row m.

    x: [tokens, D]; weight: [E, F, D]; offsets: int32 [E + 1], expert e owns rows offsets[e] to offsets[e + 1], from 0
    to M; rows: int32 [M], or None for x's own rows in order (M = tokens); scale: [M], of any floating-point type, or
    None for 1; result: [M, F]. Raises ValueError for shapes that do not fit.
    """
    if scale is not None and len(scale) != (x.shape[0] if rows is None else rows.shape[0]):
        raise ValueError(f"grouped_linear: scale has {len(scale)} rows, but the result has another number")
    x_MD = x if rows is None else x.index_select(0, rows)
    lengths = segment_lengths("grouped_linear", "offsets", offsets, x_MD.shape[0])
    out_MF = products(x_MD, weight, {e: length for e, length in enumerate(lengths) if length})
    if scale is None:
        return out_MF
    return cast(cast(out_MF, compute_dtype(x)) * cast(scale, compute_dtype(x)).unsqueeze(1), x.dtype)


def products(x_MD: Tensor, weight: Tensor, rows_of: dict[int, int]) -> Tensor:
    """Rows sorted by expert, times their experts' weights; rows_of: of each expert that has any, in order, how many."""
    if not rows_of:
        return x_MD.new_zeros(0, weight.shape[1])
    x_parts = x_MD.split_with_sizes(list(rows_of.values()))
    E, F, D = weight.shape
    most = max(rows_of.values())
    if own_way(weight) and not pays(most, F * D) and (P := parts(most, weight)) > 1:
        weight_EPDf = weight.view(E, P, F // P, D).mT  # as in `product`, prepared once for all experts
        out_PMf = [torch.bmm(x_mD.expand(P, -1, -1), weight_EPDf[e]) for e, x_mD in zip(rows_of, x_parts, strict=True)]
        return rows_first(torch.cat(out_PMf, dim=1))
    # unbind: one gradient for all experts
    weights = weight.unbind() if weight.requires_grad and torch.is_grad_enabled() else weight
    return torch.cat([product(x_mD, weights[e]) for e, x_mD in zip(rows_of, x_parts, strict=True)])
