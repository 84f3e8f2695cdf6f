"""Lets the unmodified Megatron-Core run on a CPU with Gloo. The only file that patches anything.

`install()` does nothing where CUDA is available. Elsewhere it must run before `megatron` is imported anywhere in
the process. Checked with megatron-core 0.16.1 and 0.19.2; a patch that only one of them needs says so.

Left out: everything that Megatron does on purpose with CUDA alone (CUDA graphs, FP8, fused all-to-all, symmetric
memory). Those paths stay broken on a CPU and no recipe of ours turns them on.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

import torch
from torch.utils import _device

_installed = False

FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "empty_like",
    "zeros_like",
)

MEGATRON_MODULES = (
    "megatron.core", "megatron.core.models.gpt.gpt_model", "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer", "megatron.core.distributed", "megatron.core.pipeline_parallel",
    "megatron.core.dist_checkpointing",
)  # fmt: skip


def install() -> bool:
    """Patch torch and Megatron-Core for a machine without CUDA.

    Returns:
        True when the shim is (now or already) installed, False on a machine with CUDA.

    Raises:
        RuntimeError: megatron.core.jit was imported before, so its torch.compile decorators are already in place.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    if "megatron.core.jit" in sys.modules:
        raise RuntimeError("cpu_shim.install() must run before anything imports megatron.core")
    _patch_streams()
    _patch_factories()
    _patch_tensor_methods()
    with _triton_stand_in():
        _import_without_compile()
    _patch_rng_tracker()
    _patch_moe()
    _patch_latent_attention()
    _patch_uneven_gathers()
    _installed = True
    return True


def allow_gated_delta_net() -> None:
    """Megatron refuses to build its GatedDeltaNet without the package fla, on CUDA too. Our forward of it
    (gated_delta_net.py) needs none of fla."""
    importlib.import_module("megatron.core.ssm.gated_delta_net").HAVE_FLA = True


class _NullStream:
    """Stands for torch.cuda.Stream and Event: on a CPU every operation has finished when it returns."""

    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _NullStream()

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def _patch_streams() -> None:
    """torch.cuda: Megatron asks for the current device and stream on every path, even without a GPU."""
    cuda = torch.cuda
    null_stream = _NullStream()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda device=None: null_stream
    cuda.default_stream = lambda device=None: null_stream
    cuda.Stream = _NullStream
    cuda.Event = _NullStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0
    # The "GPU" generator is the CPU's own, so Megatron's seed bookkeeping keeps its meaning.
    cuda.get_rng_state = lambda device=None: torch.random.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.random.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed


def _patch_factories() -> None:
    """torch.empty(..., device="cuda") and the like: literal devices in schedules, optimizer and clip_grads."""
    # `with torch.device("meta")` knows factories by identity and remembers them at its first use. It must remember the
    # originals, which the wrappers call; else transformers loads models with tables of angles that nobody filled.
    _device._device_constructors()

    def on_cpu(factory):
        @functools.wraps(factory)
        def wrapper(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapper

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_tensor_methods() -> None:
    """Tensor.cuda, record_stream and type(): the optimizer compares type() with 'torch.cuda.FloatTensor'."""
    original_type = torch.Tensor.type

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None


@contextlib.contextmanager
def _triton_stand_in():
    """0.19 only: `import triton` at module level, for kernels that a CPU never launches. 0.16 does without it.

    Taken away again after Megatron's import, because torch asks whether triton is there and would believe it.
    """
    older = importlib.metadata.version("megatron-core").startswith("0.16.")
    if older or importlib.util.find_spec("triton") is not None:
        yield
        return
    names = ("triton", "triton.language", "triton.language.extra")
    for name in names:
        module = _KernelLanguage(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["triton"].language = sys.modules["triton.language"]
    sys.modules["triton"].__version__ = "3.4.0"
    yield
    for name in names:
        del sys.modules[name]


class _KernelLanguage(types.ModuleType):
    """Answers whatever a kernel's definition asks of triton (decorators, types); a launch fails."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _definition_only


def _definition_only(*args, **kwargs):
    """A decorator with or without arguments, or a type: gives back the decorated function or itself."""
    return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _definition_only


def _import_without_compile() -> None:
    """megatron.core.jit decorates with torch.compile, which would start a C++ compiler in every rank."""
    compile_ = torch.compile

    def no_compile(model=None, **kwargs):
        return model if model is not None else (lambda function: function)

    torch.compile = no_compile
    try:
        for name in MEGATRON_MODULES:
            importlib.import_module(name)
    finally:
        torch.compile = compile_


def _patch_rng_tracker() -> None:
    """tensor_parallel.random reaches into torch.cuda.default_generators, empty on a CPU."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.random.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.random.set_rng_state(state)


def _patch_moe() -> None:
    """te_general_gemm is undefined without Transformer Engine; split sizes must be plain numbers for Gloo."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    moe_utils.te_general_gemm = None

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _patch_latent_attention() -> None:
    """It takes Transformer Engine for present where only stand-ins for Megatron's wrappers of it are."""
    attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.HAVE_TE = isinstance(attention.TELinear, type)


def _patch_uneven_gathers() -> None:
    """Gloo gathers and scatters parts of equal length alone. Ranks that share an expert's matrices, but are of several
    replicas (expert tensor above tensor parallelism), have different numbers of tokens."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_, group, output_split_sizes=None, *args, **kwargs):
        if output_split_sizes is None or len(set(output_split_sizes)) == 1 or group.size() == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: input_.size(0)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_uneven(input_, group, input_split_sizes=None, *args, **kwargs):
        if input_split_sizes is None or len(set(input_split_sizes)) == 1 or group.size() == 1:
            return scatter(input_, group, input_split_sizes, *args, **kwargs)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_uneven, scatter_uneven
