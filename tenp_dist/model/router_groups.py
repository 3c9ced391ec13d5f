"""That the groups which a config divides experts into are such that its router can choose among them.

transformers' routers reshape the scores of all tokens to [tokens, groups, experts of a group]: where the division does
not come out, scores of different tokens mix without a word, or the reshape fails in the middle of a run.
"""

from __future__ import annotations

from typing import Any, NoReturn

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.errors import SourceError

_UNGROUPED = "greedy"  # `topk_method` of DeepSeek-V2 that uses no groups


def check_groups(family: Family, stock: Any, stated: int) -> None:
    """Hold groups, chosen groups and experts of a token against each other.

    Args:
        stock: transformers' config, with its defaults for what config.json leaves out.
        stated: groups that config.json states, 1 where it states none (`Family.groups`).

    Raises:
        SourceError: names the first number that does not fit.
    """
    if family.groups_key is None or getattr(stock, "topk_method", None) == _UNGROUPED:
        return
    groups = _number(stock, family.groups_key)
    chosen = _number(stock, family.chosen_groups_key) if family.chosen_groups_key else groups
    experts = next(int(count) for key in family.experts_keys if (count := getattr(stock, key, None)))
    top_k = int(getattr(stock, family.top_k_key))
    if groups != stated:
        _refuse(
            family.groups_key, f"nothing, which transformers takes for {groups}", "the number that was trained with"
        )
    size, rest = divmod(experts, groups)
    if rest:
        _refuse(family.groups_key, f"{experts} experts in {groups} groups", f"a divisor of {experts}")
    if size < family.group_scorers:
        wanted = f"groups of at least {family.group_scorers}, whose scores rank the group"
        _refuse(family.groups_key, f"{experts} experts in {groups} groups", wanted)
    if not 1 <= chosen <= groups:
        _refuse(str(family.chosen_groups_key), f"{chosen} of {groups} groups", f"1 to {groups}")
    if top_k > chosen * size:
        found = f"{top_k} experts of {chosen} groups of {size}"
        _refuse(family.top_k_key, found, f"at most {chosen * size}")


def _number(stock: Any, key: str) -> int:
    value = getattr(stock, key, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(key, repr(value), "a whole number above 0")
    return value


def _refuse(key: str, found: str, wanted: str) -> NoReturn:
    raise SourceError(
        "The router cannot choose among the groups that the config states",
        where=f"config.json: {key}",
        found=found,
        wanted=wanted,
        next_step="download config.json again: experts and groups are what the model was trained with",
    )
