"""`torch.cuda` of the simulated device: graphs, streams, events, memory and random state."""

import contextlib

import torch

from tests.sim.device import GPU, Device, Recorder, SimulatedDevice, SimulatedTensor, sync

_Generator = torch.Generator


class Graph:
    """Plays `torch.cuda.CUDAGraph`."""

    def __init__(self, *_, **__):
        self.calls = []

    @torch.no_grad()
    def replay(self) -> None:
        """Run the captured operations on the memory that they were captured with."""
        for call in self.calls:
            call.replay()

    def reset(self) -> None:
        """Forget the operations."""
        self.calls = []


class Capture:
    """Plays `torch.cuda.graph`: the context that captures."""

    def __init__(self, graph: Graph, *_, **__):
        self.graph = graph

    def __enter__(self) -> None:
        Device.capturing = Recorder()

    @torch.no_grad()
    def __exit__(self, *_) -> None:
        recorder, Device.capturing = Device.capturing, None
        recorder.undo()
        self.graph.calls = recorder.calls


class Stream:
    """Plays `torch.cuda.Stream`: the simulated device does one thing after the other."""

    device, device_index, cuda_stream = GPU, 0, 0

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other: "Stream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Nothing to wait for."""

    def record_event(self, *_) -> "Event":
        """An event of this stream."""
        return Event()

    def synchronize(self) -> None:
        """The host waits."""
        sync("synchronize")


class Event:
    """Plays `torch.cuda.Event`."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_) -> None:
        """Nothing to record."""

    def elapsed_time(self, end: "Event") -> float:
        """The milliseconds between two events: any will do."""
        return 1.0

    def synchronize(self) -> None:
        """The host waits."""
        sync("synchronize")


class Properties:
    """The properties of an H100."""

    name, major, minor, multi_processor_count, total_memory = "NVIDIA H100 80GB HBM3", 9, 0, 132, 80 << 30
    regs_per_multiprocessor, max_threads_per_multi_processor, warp_size, L2_cache_size = 65_536, 2048, 32, 50 << 20
    gcnArchName = ""


class Generator(_Generator):
    """Plays `torch.Generator`, of the device if asked for one."""

    def __new__(cls, device="cpu"):
        if torch.device(device).type == "cpu":
            return _Generator()
        generator = super().__new__(cls)
        generator.on_host = _Generator()
        return generator

    @property
    def device(self) -> torch.device:
        """The simulated device."""
        return GPU

    def manual_seed(self, seed: int) -> "Generator":
        """Seed the generator."""
        self.on_host.manual_seed(seed)
        return self


def _pin_memory(tensor: torch.Tensor, *_) -> torch.Tensor:
    if isinstance(tensor, SimulatedTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    Device.pinned.add(pinned.data_ptr())
    return pinned


def _empty(*shape, pin_memory: bool = False, empty=torch.empty, **options) -> torch.Tensor:
    tensor = empty(*shape, **options)
    return _pin_memory(tensor) if pin_memory else tensor


def _set_sync_debug_mode(mode: str) -> None:
    Device.sync_debug_mode = mode


_FUNCTIONS = {
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: Properties.name,
    "get_device_capability": lambda device=None: (Properties.major, Properties.minor),
    "get_device_properties": lambda device=None: Properties,
    "is_bf16_supported": lambda including_emulation=True: True,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "max_memory_allocated": lambda device=None: 1 << 27,
    "memory_allocated": lambda device=None: 1 << 27,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
    "is_current_stream_capturing": lambda: Device.capturing is not None,
    "set_sync_debug_mode": _set_sync_debug_mode,
    "manual_seed": lambda seed: Device.generator.manual_seed(seed),
    "manual_seed_all": lambda seed: Device.generator.manual_seed(seed),
    "get_rng_state": lambda device=None: Device.generator.get_state(),
    "set_rng_state": lambda state, device=None: Device.generator.set_state(state),
    "get_rng_state_all": lambda: [Device.generator.get_state()],
    "set_rng_state_all": lambda states: Device.generator.set_state(states[0]),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "set_stream": lambda stream: None,
    "stream": lambda stream: contextlib.nullcontext(),
    "device": lambda device: contextlib.nullcontext(),
    "CUDAGraph": Graph,
    "graph": Capture,
    "Stream": Stream,
    "Event": Event,
    "simulated": True,
}


def install() -> None:
    """Replace what asks for a driver, for the rest of the process."""
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda._initialized = True
    for name, replacement in _FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    torch.utils._foreach_utils._foreach_supported_types.append(SimulatedTensor)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory, torch.Generator, torch.empty = _pin_memory, Generator, _empty
    torch.__future__.set_swap_module_params_on_conversion(True)  # assigning `.data` leaves a subclass as it is
    torch.inference_mode = lambda mode=True: torch.no_grad()  # an inference tensor cannot be wrapped
    torch._C._set_only_lift_cpu_tensors(True)
    SimulatedDevice().__enter__()
