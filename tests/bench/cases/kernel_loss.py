"""The loss head: contenders, inputs, and the fp32 or fp64 oracle that every gradient is compared with.

Inputs are drawn like a trained model's: the label's logit is 4 to 16 above the noise of the others, so that some tokens
are certain and some are not; a contender that skips small probabilities finds them where a model has them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from headrace.bench.kernel_case import MIB, OURS, TORCH, Case, NotHere, Shared, Task, generator, oracle_dtype
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api
from headrace.storage.core.errors import InputError

# Published heads: tokens x vocabulary x width.
SHAPES = {
    "gemma2_2b": (8192, 256_000, 2304),
    "llama3_8b": (8192, 128_256, 4096),
    "qwen2_5_7b": (8192, 152_064, 3584),
}
CUDA_SHAPES = ("gemma2_2b", "llama3_8b", "qwen2_5_7b")
CPU_SHAPES = ("256x4096x128", "251x2053x96")
SOFTCAP = 30.0
WORKSPACE_BYTES = 256 * MIB
WIDE_TOKENS = 4096
# Columns of the random matrix that a gradient is multiplied by before it is compared: the relative error of the product
# is that of the gradient within a few percent, and a gradient of 2 GiB becomes 16 MiB.
SKETCH_COLUMNS = 16
ORACLE_LOGITS = 2**28


class Head(NamedTuple):
    """The inputs: hidden (N, D), weight (V, D), both leaves; targets (N,) int64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor


class Oracle(NamedTuple):
    """Mean loss, and the sketches of its two gradients."""

    loss: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor


def loss_shape(word: str) -> tuple[int, int, int]:
    """Tokens, vocabulary and width of a name or of NxVxD.

    Raises:
        InputError: neither.
    """
    if word in SHAPES:
        return SHAPES[word]
    try:
        tokens, vocab, width = (int(part) for part in word.split("x"))
    except ValueError:
        raise InputError(f"shapes={word}: one of {', '.join(SHAPES)}, or TOKENSxVOCABULARYxWIDTH") from None
    if min(tokens, vocab, width) < 1:
        raise InputError(f"shapes={word}: every size is at least 1")
    return tokens, vocab, width


def cases(settings: Settings) -> list[Case]:
    """Every contender of every shape, the limits first."""
    found = []
    for word in settings.shapes or (CUDA_SHAPES if settings.on_cuda else CPU_SHAPES):
        sizes = dict(zip(("tokens", "vocab", "width"), loss_shape(word), strict=True))
        for name, family, options in _contenders(settings, **sizes):
            environment = {"LIGER_KERNEL_IMPL": "cutedsl"} if family == "liger_cute" else {}
            found.append(
                Case(
                    *("loss", word, name, family, sizes, str(settings.device), settings.dtype),
                    tolerance="linear_cross_entropy",
                    options=options,
                    environment=environment,
                )
            )
    return found


def _contenders(
    settings: Settings, tokens: int, vocab: int, width: int
) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
    """Name, family and options."""
    backend = "triton" if settings.on_cuda else "reference"
    ours: dict[str, dict[str, Any]] = {
        "ours": {"axis": "auto", "workspace_bytes": WORKSPACE_BYTES},
        "ours_tokens": {"axis": "tokens", "workspace_bytes": WORKSPACE_BYTES},
        "ours_vocabulary": {"axis": "vocabulary", "workspace_bytes": WORKSPACE_BYTES},
        "ours_4096": {"axis": "tokens", "tokens_per_chunk": WIDE_TOKENS},
        "ours_softcap": {"axis": "auto", "workspace_bytes": WORKSPACE_BYTES, "softcap": SOFTCAP},
        "ours_4096_softcap": {"axis": "tokens", "tokens_per_chunk": WIDE_TOKENS, "softcap": SOFTCAP},
    }
    if settings.on_cuda:
        # What Liger's CuTe path takes with its whole logits and bf16 gradients, less our gradients.
        like_liger = max(WORKSPACE_BYTES, 2 * tokens * vocab - 2 * vocab * width)
        ours["ours_equal_memory"] = {"axis": "auto", "workspace_bytes": like_liger}
        ours["ours_reference"] = {"axis": "auto", "workspace_bytes": WORKSPACE_BYTES, "backend": "reference"}
    found: list[tuple[str, str, Mapping[str, Any]]] = [
        (f"limit_{name}", TORCH, {}) for name in ("gemm_logits", "gemm_hidden", "gemm_weight", "copy")
    ]
    found += [(name, OURS, {"backend": backend, **options}) for name, options in ours.items()]
    found += [("torch_plain", TORCH, {}), ("torch_linear_cross_entropy", TORCH, {})]
    if settings.on_cuda:
        found += [("torch_compile", TORCH, {}), ("liger", "liger", {}), ("liger_cute", "liger_cute", {})]
        found += [("cce_exact", "cce", {"filter_eps": None}), ("cce", "cce", {"filter_eps": "high"})]
        found += [("quack", "quack", {"chunk_size": WIDE_TOKENS})]
    return found


LEFT_OUT_ON_CPU = {
    "torch_compile": "its kernels are compared on CUDA",
    "liger": "Triton on CUDA",
    "liger_cute": "CuTe on Hopper",
    "cce, cce_exact": "Triton on CUDA",
    "quack": "CuTe on Hopper",
}


def build(case: Case, shared: Shared) -> Task:
    """The case's tensors and passes.

    Raises:
        NotHere: the contender's package or feature is missing.
    """
    if case.is_limit:
        return _limit(case, shared)
    call, facts = _call_of(case)
    head = shared.get("head", partial(draw_head, case))
    softcap = case.options.get("softcap")
    oracle = shared.get(f"oracle {softcap}", partial(make_oracle, head, softcap))

    def forward() -> torch.Tensor:
        return call(head.hidden, head.weight, head.targets)

    def check(loss: torch.Tensor) -> Mapping[str, float]:
        assert head.hidden.grad is not None
        assert head.weight.grad is not None
        return {
            "rel_error_loss": _rel_error(loss.detach(), oracle.loss),
            "rel_error_d_hidden": _rel_error(sketch(head.hidden.grad, oracle.d_hidden.dtype), oracle.d_hidden),
            "rel_error_d_weight": _rel_error(sketch(head.weight.grad, oracle.d_weight.dtype), oracle.d_weight),
        }

    return Task(forward, lambda loss: loss.backward(), (head.hidden, head.weight), check, facts=facts)


def draw_head(case: Case) -> Head:
    """Seeded inputs on the case's device: the same bits in every process."""
    device, dtype = case.torch_device, case.torch_dtype
    tokens, vocab, width = (case.shape[key] for key in ("tokens", "vocab", "width"))
    draws = generator(device, 0)
    weight = torch.empty(vocab, width, device=device, dtype=dtype).normal_(std=width**-0.5, generator=draws)
    targets = torch.randint(0, vocab, (tokens,), device=device, generator=draws)
    targets[::97] = api.IGNORED_TARGET
    label_rows = weight[targets.clamp(min=0)].float()
    margin = torch.empty(tokens, 1, device=device).uniform_(4.0, 16.0, generator=draws)
    hidden = torch.randn(tokens, width, device=device, generator=draws)
    hidden += margin * label_rows / label_rows.square().sum(-1, keepdim=True)
    return Head(hidden.to(dtype).requires_grad_(), weight.requires_grad_(), targets)


@torch.no_grad()
def make_oracle(head: Head, softcap: float | None) -> Oracle:
    """Mean loss over the tokens that count, and its gradients: plain torch in tiles of tokens, no code of ours."""
    wide = oracle_dtype(head.hidden.device)
    weight = head.weight.detach().to(wide)
    d_hidden, d_weight = torch.empty_like(head.hidden, dtype=wide), torch.zeros_like(weight)
    num_counted = (head.targets != api.IGNORED_TARGET).sum()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    tile = max(1, ORACLE_LOGITS // weight.shape[0])
    for begin in range(0, len(head.targets), tile):
        rows = slice(begin, begin + tile)
        targets = head.targets[rows]
        counts = (targets != api.IGNORED_TARGET)[:, None]
        raw = head.hidden.detach()[rows].to(wide) @ weight.T
        logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        log_p = logits.log_softmax(-1)
        labels = targets.clamp(min=0)[:, None]
        loss -= torch.where(counts, log_p.gather(1, labels), 0.0).sum(dtype=torch.float64)
        d_logits = log_p.exp_()
        d_logits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=wide))
        if softcap is not None:
            d_logits *= 1.0 - (logits / softcap).square()
        d_logits *= counts.to(wide) / num_counted.to(wide)
        d_hidden[rows] = d_logits @ weight
        d_weight += d_logits.T @ head.hidden.detach()[rows].to(wide)
    return Oracle(loss / num_counted, sketch(d_hidden, wide), sketch(d_weight, wide))


@torch.no_grad()
def sketch(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, SKETCH_COLUMNS): the gradient times a fixed random matrix, in the dtype given."""
    draws = generator(grad.device, 1)
    matrix = torch.randn(grad.shape[1], SKETCH_COLUMNS, device=grad.device, dtype=dtype, generator=draws)
    return torch.cat([part.to(dtype) @ matrix for part in grad.split(16384)])


def _rel_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    got, oracle = got.double(), oracle.double()
    return float((got - oracle).norm() / oracle.norm())


def _limit(case: Case, shared: Shared) -> Task:
    """One plain product of the head, or a copy of as many bytes as fp32 weight gradients have."""
    device, dtype = case.torch_device, case.torch_dtype
    tokens, vocab, width = (case.shape[key] for key in ("tokens", "vocab", "width"))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if case.contender == "limit_copy":
        source, copy = (torch.ones(vocab, width, device=device) for _ in range(2))
        num_bytes = 2 * source.numel() * source.element_size()
        return Task(lambda: copy.copy_(source), None, (), lambda result: {}, forward_bytes=num_bytes)
    hidden = shared.get("plain hidden", partial(randn, tokens, width))
    weight = shared.get("plain weight", partial(randn, vocab, width))
    logits = shared.get("plain logits", partial(randn, tokens, vocab))
    product: Callable[[], torch.Tensor] = {
        "limit_gemm_logits": lambda: torch.mm(hidden, weight.T, out=logits),
        "limit_gemm_hidden": lambda: torch.mm(logits, weight),
        "limit_gemm_weight": lambda: torch.mm(logits.T, hidden),
    }[case.contender]
    return Task(product, None, (), lambda result: {}, forward_flops=2.0 * tokens * vocab * width)


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _call_of(case: Case) -> tuple[Call, Mapping[str, Any]]:
    """hidden, weight, targets -> mean loss, and what is to be known of the contender."""
    if case.family == OURS:
        return _ours(case), {}
    if case.family == TORCH:
        return _torch(case), {}
    try:
        return {"liger": _liger, "liger_cute": _liger_cute, "cce": _cce, "quack": _quack}[case.family](case)
    except ImportError as error:
        raise NotHere(f"{case.contender} is not installed here: {error}") from error


def _ours(case: Case) -> Call:
    options = dict(case.options)
    backend, softcap = api.Backend(options.pop("backend")), options.pop("softcap", None)
    chosen = api.LossOptions(**{**options, "axis": api.ChunkAxis(options["axis"])})
    return lambda h, w, y: api.linear_cross_entropy(h, w, y, softcap=softcap, options=chosen, backend=backend)


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The plain form: whole logits, softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _torch(case: Case) -> Call:
    if case.contender == "torch_plain":
        return plain_loss
    if case.contender == "torch_compile":
        return torch.compile(plain_loss)
    if not hasattr(F, "linear_cross_entropy"):
        raise NotHere(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)


def _liger(case: Case) -> tuple[Call, Mapping[str, Any]]:
    """Its default: Triton, logits of a chunk of tokens, the weight gradient summed in the weight's dtype."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Loss

    return lambda h, w, y: Loss.apply(h, w, y)[0], _version("liger-kernel")


def _liger_cute(case: Case) -> tuple[Call, Mapping[str, Any]]:
    """The CuTe path for Hopper has a function of its own; what LIGER_KERNEL_IMPL=cutedsl exports is Blackwell's."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import LigerFusedLinearCrossEntropySM90Function

    apply = LigerFusedLinearCrossEntropySM90Function.apply
    return lambda h, w, y: apply(h, w, y), _version("liger-kernel")


def _cce(case: Case) -> tuple[Call, Mapping[str, Any]]:
    from cut_cross_entropy import linear_cross_entropy

    eps = case.options["filter_eps"]
    return lambda h, w, y: linear_cross_entropy(h, w, y, filter_eps=eps), _version("cut-cross-entropy")


def _quack(case: Case) -> tuple[Call, Mapping[str, Any]]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunk = case.options["chunk_size"]
    return lambda h, w, y: chunked_linear_cross_entropy(h, w, y, chunk_size=chunk), _version("quack-kernels")


def _version(package: str) -> Mapping[str, Any]:
    return {"package": package, "package_version": importlib.metadata.version(package)}
