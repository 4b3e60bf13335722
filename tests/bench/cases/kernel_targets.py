"""What was promised of the kernels on one H200, judged from rows of the same run.

The limits of the loss head are what its matrix products alone take, timed here in bf16 at the same shape, plus the
traffic that the cut itself makes at a workspace of W bytes of bf16 logits:

    three products  tokens in chunks of W / 2 V; every chunk after the first reads and writes the fp32 weight gradient
    four products   columns in chunks of W / 2 N; every chunk after the first reads and writes the fp32 input gradient

with the bandwidth of a plain copy of the same run. The better of the two is the limit. The lower bound of memory is
both gradients in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headrace.bench.harness import Row, Target
from headrace.bench.kernel_case import MIB, Case
from headrace.bench.kernel_loss import WIDE_TOKENS, WORKSPACE_BYTES
from headrace.helpers.tolerances import REL_ERROR

SLACK_MIB = 256
TIME_OVER_LIMIT, TIME_OVER_QUACK, STREAMING_SHARE = 1.25, 1.1, 0.92
# The contenders of ours that the targets speak of, with what each is compared with.
NARROW, WIDE = ("ours", "ours_softcap"), ("ours_4096", "ours_4096_softcap")
WITHOUT_SOFTCAP = ("ours", "ours_tokens", "ours_vocabulary", "ours_4096", "ours_equal_memory")


@dataclass(frozen=True)
class Limits:
    """Milliseconds and bytes of the machine at one shape; see the module.

    copy_gbps: bytes read and written.
    """

    tokens: int
    vocab: int
    width: int
    three_ms: float
    logits_ms: float
    copy_gbps: float

    @property
    def bound_mib(self) -> float:
        """Both gradients in fp32: 2,322 MiB at 8192 x 256,000 x 2304."""
        return 4 * (self.vocab + self.tokens) * self.width / MIB

    def three_products_ms(self, workspace_bytes: float) -> float:
        """Three products and the traffic of their chunks."""
        chunks = math.ceil(self.tokens / max(1, workspace_bytes // (2 * self.vocab)))
        return self.three_ms + (chunks - 1) * 8 * self.vocab * self.width / self.copy_gbps / 1e6

    def four_products_ms(self, workspace_bytes: float) -> float:
        """Four products and the traffic of their chunks."""
        chunks = math.ceil(self.vocab / max(1, workspace_bytes // (2 * self.tokens)))
        return self.three_ms + self.logits_ms + (chunks - 1) * 8 * self.tokens * self.width / self.copy_gbps / 1e6

    def limit_ms(self, workspace_bytes: float) -> float:
        """The better of the two."""
        return min(self.three_products_ms(workspace_bytes), self.four_products_ms(workspace_bytes))


def with_agreement(case: Case, row: Row) -> Row:
    """The row with the verdict on its errors against the oracle, by the tolerance table, ours and others alike."""
    errors = [float(value) for key, value in row.numbers.items() if key.startswith("rel_") and value is not None]
    differing = row.numbers.get("differing_entries")
    if row.error is None and differing is not None:
        return Row(row.name, row.numbers, row.config, Target("bit for bit the reference", differing == 0))
    if row.error is not None or not errors:
        return row
    bound = REL_ERROR[case.tolerance][case.torch_dtype]
    # A NaN is within nothing, whatever max says of it.
    met = all(error <= bound for error in errors)
    return Row(row.name, row.numbers, row.config, Target(f"result and gradients within {bound:g}", met))


def loss_targets(shape_name: str, shape: Mapping[str, int], rows: Mapping[str, Row], *, judged: bool) -> Iterator[Row]:
    """The limits, and every target of the loss head.

    Args:
        rows: by contender.
        judged: whether the machine is one that the targets speak of; ratios without a verdict otherwise.
    """
    name = f"loss/{shape_name}"
    limits = _limits(shape, rows)
    if limits is None:
        yield Row(f"{name}/limits", error="a plain product or the copy was not measured: see its row")
        return
    wide_bytes = 2 * limits.vocab * WIDE_TOKENS
    numbers = {
        "bound_mib": limits.bound_mib,
        "products_3_ms": limits.three_ms,
        "products_4_ms": limits.three_ms + limits.logits_ms,
        "copy_gbps": limits.copy_gbps,
    }
    for word, workspace_bytes in (("256mib", WORKSPACE_BYTES), ("4096_tokens", wide_bytes)):
        numbers[f"limit_3_{word}_ms"] = limits.three_products_ms(workspace_bytes)
        numbers[f"limit_4_{word}_ms"] = limits.four_products_ms(workspace_bytes)
    yield Row(f"{name}/limits", numbers, dict(shape))
    for workspace_bytes, names in ((WORKSPACE_BYTES, NARROW), (wide_bytes, WIDE)):
        limit_ms = limits.limit_ms(workspace_bytes)
        for ours in names:
            text = f"at most {TIME_OVER_LIMIT} x the better limit at that workspace"
            row = _ratio(f"{name}/time_over_limit/{ours}", rows, ours, limit_ms, TIME_OVER_LIMIT, text)
            yield _verdict(row, judged)
    if judged:
        yield from _memory_targets(name, limits, rows)
        yield from _peer_targets(name, rows)


def _limits(shape: Mapping[str, int], rows: Mapping[str, Row]) -> Limits | None:
    found = {}
    for word in ("gemm_logits", "gemm_hidden", "gemm_weight", "copy"):
        row = rows.get(f"limit_{word}")
        key = "forward_gbps" if word == "copy" else "forward_ms"
        value = None if row is None or row.error is not None else row.numbers.get(key)
        if value is None:
            return None
        found[word] = float(value)
    three_ms = found["gemm_logits"] + found["gemm_hidden"] + found["gemm_weight"]
    return Limits(**shape, three_ms=three_ms, logits_ms=found["gemm_logits"], copy_gbps=found["copy"])


def _memory_targets(name: str, limits: Limits, rows: Mapping[str, Row]) -> Iterator[Row]:
    most_mib = limits.bound_mib + SLACK_MIB
    for ours in NARROW:
        text = f"at most dC + dE in fp32 ({limits.bound_mib:,.0f} MiB) + {SLACK_MIB} MiB"
        mib = _number(rows, ours, "extra_mib")
        if mib is None:
            yield _missing(f"{name}/memory/{ours}", rows, ours)
            continue
        numbers = {"extra_mib": mib, "over_bound_mib": mib - limits.bound_mib}
        yield Row(f"{name}/memory/{ours}", numbers, target=Target(text, mib <= most_mib))


def _peer_targets(name: str, rows: Mapping[str, Row]) -> Iterator[Row]:
    quack_ms = _number(rows, "quack", "total_ms")
    for ours in WIDE:
        text = f"at most {TIME_OVER_QUACK} x QuACK, both with chunks of {WIDE_TOKENS} tokens"
        row_name = f"{name}/time_over_quack/{ours}"
        if quack_ms is None:
            yield _missing(row_name, rows, "quack")
        else:
            yield _ratio(row_name, rows, ours, quack_ms, TIME_OVER_QUACK, text)
    yield _over_liger(name, rows)
    cce_ms = _number(rows, "cce_exact", "total_ms")
    row_name = f"{name}/time_over_cce_exact/ours"
    if cce_ms is None:
        yield _missing(row_name, rows, "cce_exact")
    else:
        yield _ratio(row_name, rows, "ours", cce_ms, 1.0, "faster than exact CCE")


def _over_liger(name: str, rows: Mapping[str, Row]) -> Row:
    """Our fastest that takes no more memory than Liger's CuTe path."""
    row_name = f"{name}/time_over_liger_cute"
    liger_ms, liger_mib = _number(rows, "liger_cute", "total_ms"), _number(rows, "liger_cute", "extra_mib")
    if liger_ms is None or liger_mib is None:
        return _missing(row_name, rows, "liger_cute")
    fitting = {}
    for ours in WITHOUT_SOFTCAP:
        total_ms, mib = _number(rows, ours, "total_ms"), _number(rows, ours, "extra_mib")
        if total_ms is not None and mib is not None and mib <= liger_mib:
            fitting[ours] = total_ms
    if not fitting:
        return Row(row_name, error=f"none of ours was measured within the {liger_mib:.0f} MiB of Liger's CuTe path")
    best = min(fitting, key=fitting.__getitem__)
    text = f"faster than Liger's CuTe path within its {liger_mib:,.0f} MiB"
    return _ratio(f"{row_name}/{best}", rows, best, liger_ms, 1.0, text)


def share_of_copy(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of a block or codec group, with each rate as a share of the group's plain copy."""
    copy_gbps = _number(rows, "copy", "forward_gbps")
    found = {}
    for contender, row in rows.items():
        more = {}
        for direction in ("forward", "backward"):
            rate = row.numbers.get(f"{direction}_gbps")
            if copy_gbps and rate is not None and contender != "copy":
                more[f"{direction}_share_of_copy"] = float(rate) / copy_gbps
        found[contender] = Row(row.name, {**row.numbers, **more}, row.config, row.target, row.error)
    return found


def attention_targets(shape_name: str, rows: Mapping[str, Row], *, judged: bool) -> Iterator[Row]:
    """Streaming over resident blocks against the stock operator on the whole prefix, both ways."""
    for direction in ("forward", "backward"):
        name = f"attention/{shape_name}/share_of_stock/{direction}"
        stock, ours = (_number(rows, word, f"{direction}_ms") for word in ("stock", "streaming"))
        if stock is None or ours is None:
            yield _missing(name, rows, "stock" if stock is None else "streaming")
            continue
        share = stock / ours
        target = Target(f"at least {STREAMING_SHARE:.0%} of the stock operator's speed", share >= STREAMING_SHARE)
        yield _verdict(Row(name, {"share": share, "stock_ms": stock, "streaming_ms": ours}, target=target), judged)


def _ratio(name: str, rows: Mapping[str, Row], ours: str, other_ms: float, most: float, text: str) -> Row:
    total_ms = _number(rows, ours, "total_ms")
    if total_ms is None:
        return _missing(name, rows, ours)
    ratio = total_ms / other_ms
    met = ratio < most if most == 1.0 else ratio <= most
    return Row(name, {"ratio": ratio, "ours_ms": total_ms, "other_ms": other_ms}, target=Target(text, met))


def _verdict(row: Row, judged: bool) -> Row:
    return row if judged else Row(row.name, row.numbers, row.config, None, row.error)


def _number(rows: Mapping[str, Row], contender: str, key: str) -> float | None:
    row = rows.get(contender)
    value = None if row is None or row.error is not None else row.numbers.get(key)
    return None if value is None else float(value)


def _missing(name: str, rows: Mapping[str, Row], contender: str) -> Row:
    row = rows.get(contender)
    why = "it was not requested" if row is None else row.error or "it has no such number"
    return Row(name, error=f"no result to compare: {contender}: {why}")
