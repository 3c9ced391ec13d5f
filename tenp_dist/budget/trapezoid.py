"""How many experts each layer keeps whole, and how wide the others become: exact arithmetic only.

Notation: N routed experts in the model, E of them in a layer, F neurons of an expert, L layers,
rho the retention, alpha the share of experts kept whole, M = floor(alpha N), beta the share of its
neurons that a narrow expert keeps (TENP, arXiv 2606.09885, appendix D). Every size of the plan is a
`Fraction` made from the decimal strings of the job, never a float.

The depth schedule is ours: the paper publishes none. slope 0 is a rectangle, 1/3 keeps twice as many
whole experts at the top as at the bottom, 1 keeps none at the bottom, and a negative slope turns the
trapezoid over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from tenp_dist.errors import BudgetError

WASTE_LIMIT = Fraction(1, 100)


def whole_experts_total(alpha: Fraction, experts: int) -> int:
    """M = floor(alpha * N)."""
    return math.floor(Fraction(alpha) * experts)


def depth_weights(sizes: Sequence[int], slope: Fraction) -> list[Fraction]:
    """E_l * (1 + slope * (2 z_l - 1)) with z_l = l / (L - 1), or 1/2 for a single layer."""
    last = len(sizes) - 1
    depths = [Fraction(layer, last) if last else Fraction(1, 2) for layer in range(len(sizes))]
    return [size * (1 + Fraction(slope) * (2 * z - 1)) for size, z in zip(sizes, depths, strict=True)]


def apportion(total: int, sizes: Sequence[int], slope: Fraction, minimum: int | Sequence[int] = 0) -> list[int]:
    """Whole experts per layer, `total` exactly, each between `minimum` and the layer's size.

    The shares follow `depth_weights`; a layer whose share passes its size or falls below `minimum` is
    fixed there and the rest is shared again, by size once only layers of weight zero are left. Shares
    become integers by largest remainder, ties to the deeper layer.

    Args:
        total: whole experts in the model (M).
        sizes: routed experts of each MoE layer, in depth order.
        slope: -1 to 1.
        minimum: whole experts that every layer keeps at least, or a number for each.

    Raises:
        BudgetError: no such allocation exists, or the slope is out of range.
    """
    minima = [minimum] * len(sizes) if isinstance(minimum, int) else list(minimum)
    _check_apportion(total, sizes, slope, minima)
    return _largest_remainder(bounded_shares(total, sizes, depth_weights(sizes, slope), minima), total)


def bounded_shares(
    total: int, sizes: Sequence[int], weights: Sequence[Fraction], minima: Sequence[int]
) -> list[Fraction]:
    """clamp(c * weight, minimum, size) with the c that makes the sum `total`.

    A layer is fixed only on the side that the whole sum errs to: fixing both sides at once can
    strand a layer at a bound that the next round would have lifted it from.
    """
    shares: dict[int, Fraction] = {}
    free = set(range(len(sizes)))
    while free:
        left = total - sum(shares.values(), Fraction(0))
        by_size = all(weights[layer] == 0 for layer in free)
        weight = {layer: Fraction(sizes[layer]) if by_size else weights[layer] for layer in free}
        unit = left / sum(weight.values(), Fraction(0))
        ideal = {layer: unit * weight[layer] for layer in free}
        bounded = {layer: min(max(ideal[layer], Fraction(minima[layer])), Fraction(sizes[layer])) for layer in free}
        excess = sum(bounded.values(), Fraction(0)) - left
        if excess == 0:
            fixed = free
        elif excess > 0:
            fixed = {layer for layer in free if bounded[layer] > ideal[layer]}
        else:
            fixed = {layer for layer in free if bounded[layer] < ideal[layer]}
        shares |= {layer: bounded[layer] for layer in fixed}
        free = free - fixed
    return [shares[layer] for layer in range(len(sizes))]


def _largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    counts = [math.floor(share) for share in shares]
    # Fewer are missing than there are fractional shares, so no layer at a bound is ever raised.
    missing = total - sum(counts)
    order = sorted(range(len(shares)), key=lambda layer: (shares[layer] - counts[layer], layer), reverse=True)
    for layer in order[:missing]:
        counts[layer] += 1
    return counts


def _check_apportion(total: int, sizes: Sequence[int], slope: Fraction, minima: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise BudgetError("A MoE layer needs at least one routed expert", found=list(sizes), wanted="sizes above 0")
    if not -1 <= slope <= 1:
        raise BudgetError("Slope out of range", where="budget.slope", found=slope, wanted="-1 to 1")
    if not 0 <= total <= sum(sizes):
        raise BudgetError(
            "Whole experts do not fit into the model",
            where="budget.important",
            found=f"{total} whole experts",
            wanted=f"0 to {sum(sizes)}, the routed experts of the model",
            next_step="lower budget.important",
        )
    if any(minimum > size for minimum, size in zip(minima, sizes, strict=True)):
        raise BudgetError(
            "A layer has fewer experts than every layer must keep whole",
            where="budget.minimum_important",
            found=max(minima),
            wanted=f"at most {min(sizes)}",
            next_step="lower budget.minimum_important",
        )
    if sum(minima) > total:
        raise BudgetError(
            "Too few whole experts to give every layer its minimum",
            where="budget.minimum_important",
            found=f"{max(minima)} for each of {len(sizes)} layers, {sum(minima)} in all",
            wanted=f"at most {total} in all, floor(important * experts)",
            next_step="lower budget.minimum_important or raise budget.important",
        )


def narrow_share(
    rho: Fraction, whole: Sequence[int], experts: Sequence[int], intermediate_sizes: Sequence[int]
) -> Fraction:
    """beta, the share of its neurons that every narrow expert may keep (appendix D).

    Per layer: whole experts, routed experts and F. An expert counts by its neurons, which its
    parameters are proportional to, so with one F this is (rho N - M) / (N - M). 1 where no expert is
    narrow.

    Raises:
        BudgetError: the whole experts alone are over the target.
    """
    layers = list(zip(whole, experts, intermediate_sizes, strict=True))
    left = Fraction(rho) * sum(count * size for _, count, size in layers) - sum(m * size for m, _, size in layers)
    if left < 0:
        raise BudgetError(
            "The whole experts alone are over the target",
            where="budget.important",
            found=f"{sum(whole)} whole experts",
            wanted=f"at most the share {rho} of all routed parameters",
            next_step="lower budget.important or raise budget.retention",
        )
    narrow = sum((count - m) * size for m, count, size in layers)
    return left / narrow if narrow else Fraction(1)


def aligned_width(
    beta: Fraction, intermediate_size: int, align: int, *, empty_allowed: bool = False, key: str = "align"
) -> int:
    """The largest legal width that keeps at most `beta` of the neurons: a multiple of `align`, or F itself.

    Args:
        empty_allowed: whether a width of 0 is an answer where a part of a width is left (alpha = rho
            asks for empty narrow experts). With beta = 0 it always is.
        key: of the budget that `align` comes from, for the message.

    Raises:
        BudgetError: no multiple of `align` fits.
    """
    wanted = beta * intermediate_size
    if align <= intermediate_size:
        width = intermediate_size if wanted >= intermediate_size else align * math.floor(wanted / align)
        if width or not wanted or empty_allowed:
            return width
    raise BudgetError(
        "No narrow width meets the alignment",
        where=f"budget.{key}",
        found=f"{key} {align}, experts {intermediate_size} wide, {float(wanted):.2f} neurons to keep in each",
        wanted=f"a multiple of {align} between {align} and {math.floor(wanted)}",
        next_step=f"lower budget.{key} or budget.important, or raise budget.retention",
    )


def narrow_width(
    rho: Fraction,
    whole_total: int,
    experts_total: int,
    intermediate_size: int,
    align: int,
    *,
    empty_allowed: bool = False,
) -> int:
    """align * floor((rho N - M) F / ((N - M) align)), for a model whose experts are all of one size.

    F where that is allowed (rho = 1) or no expert is narrow (M = N). Raises BudgetError as
    `narrow_share` and `aligned_width` do.
    """
    beta = narrow_share(rho, [whole_total], [experts_total], [intermediate_size])
    return aligned_width(beta, intermediate_size, align, empty_allowed=empty_allowed)


def narrow_widths(
    rho: Fraction,
    whole: Sequence[int],
    experts: Sequence[int],
    intermediate_sizes: Sequence[int],
    align: int,
    *,
    empty_allowed: bool = False,
    key: str = "align",
) -> list[int]:
    """One narrow width per layer, all from one beta and each rounded down, so never over the target.

    The same width in every layer when the experts are all of one size.
    """
    beta = narrow_share(rho, whole, experts, intermediate_sizes)
    return [aligned_width(beta, size, align, empty_allowed=empty_allowed, key=key) for size in intermediate_sizes]


def waste(rho: Fraction, whole: int, experts: int, intermediate_size: int, width: int) -> Fraction:
    """The share of the allowed neurons that rounding leaves unspent, experts of one size."""
    allowed = Fraction(rho) * experts * intermediate_size
    return (allowed - whole * intermediate_size - (experts - whole) * width) / allowed


def suggest_important(
    rho: Fraction, whole_total: int, experts_total: int, intermediate_size: int, align: int, *, at_least: int = 1
) -> str | None:
    """An alpha near the asked one (given as M) that wastes less, as the shortest decimal string.

    For every aligned width w the best M is the largest with which w still fits, floor(N (rho F - w) /
    (F - w)). Of these, the nearest to M that wastes at most 1 %; if none, the one that wastes least.

    Args:
        at_least: smallest M to suggest (what `minimum_important` asks for).

    Returns:
        None when no M wastes less than the asked one.
    """
    rho = Fraction(rho)

    def waste_of(whole: int) -> Fraction:
        width = narrow_width(rho, whole, experts_total, intermediate_size, align, empty_allowed=True)
        return waste(rho, whole, experts_total, intermediate_size, width)

    widths = range(align, min(math.floor(rho * intermediate_size), intermediate_size - 1) + 1, align)
    found = {math.floor(experts_total * (rho * intermediate_size - w) / (intermediate_size - w)) for w in widths}
    now = waste_of(whole_total)
    wastes = {whole: waste_of(whole) for whole in found if whole >= at_least}
    better = {whole: share for whole, share in wastes.items() if share < now}
    if not better:
        return None
    good = [whole for whole, share in better.items() if share <= WASTE_LIMIT]
    if good:
        best = min(good, key=lambda whole: (abs(whole - whole_total), better[whole]))
    else:
        best = min(better, key=lambda whole: (better[whole], abs(whole - whole_total)))
    return _shortest_decimal(Fraction(best, experts_total), min(Fraction(best + 1, experts_total), rho))


def _shortest_decimal(low: Fraction, high: Fraction) -> str:
    """The decimal of fewest digits in [low, high), or `low` itself; one of the two is a finite decimal."""
    digits = 0
    while True:
        value = Fraction(math.ceil(low * 10**digits), 10**digits)
        if value == low or value < high:
            return exact_string(value)
        digits += 1


def exact_string(value: Fraction) -> str:
    """`0.2` for 1/5; `1/6`, which no decimal equals, as it is. `Fraction(text)` gives the value back."""
    value = Fraction(value)
    # A denominator 2^a 5^b needs max(a, b) digits, which is below its length in bits.
    for digits in range(value.denominator.bit_length()):
        if 10**digits % value.denominator == 0:
            scaled = abs(value.numerator) * 10**digits // value.denominator
            text = f"{scaled // 10**digits}" + (f".{scaled % 10**digits:0{digits}d}" if digits else "")
            return f"-{text}" if value < 0 else text
    return f"{value.numerator}/{value.denominator}"
