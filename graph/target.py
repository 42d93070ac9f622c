"""What a machine can do at most: the ceilings that the cost model divides by.

`Target` holds the few numbers of the roofline: one read bandwidth, one arithmetic rate per type, the price of
a launch. For this machine they are measured (`codegen/probe.py`); for GPUs that this machine does not have
they are the makers' published peaks, beside the limits that decide how many blocks fit on one multiprocessor.

Units: GB/s is 1e9 bytes per second; GFLOP/s and GOP/s count a multiply-add as two; sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Origin = Literal["measured", "rough", "published"]
"""How the numbers were found: by the compiled probe, by numpy for want of a compiler, in a data sheet."""


@dataclass(frozen=True)
class Target:
    """Ceilings of one machine, all cores together.

    read_gb_s: pure read from main memory, GB/s. f32_gflops, bf16_gflops, int8_gops: dot-product arithmetic,
    1e9 operations per second (a type that the machine has no instruction for carries the f32 rate).
    launch_us: what one more kernel costs even if it does nothing, microseconds. l2_bytes: per core (CPU) or
    whole (GPU). l3_bytes: whole; 0 if there is none.
    """

    name: str
    read_gb_s: float
    f32_gflops: float
    bf16_gflops: float
    int8_gops: float
    launch_us: float
    l2_bytes: int
    l3_bytes: int
    cores: int
    origin: Origin = "published"

    def __post_init__(self) -> None:
        rates = (self.read_gb_s, self.f32_gflops, self.bf16_gflops, self.int8_gops)
        if not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(f"target {self.name!r}: rates must be positive and finite, got {rates}")
        if not 0 <= self.launch_us < float("inf") or min(self.l2_bytes, self.l3_bytes) < 0 or self.cores < 1:
            raise ValueError(
                f"target {self.name!r}: launch_us={self.launch_us}, l2_bytes={self.l2_bytes}, "
                f"l3_bytes={self.l3_bytes}, cores={self.cores} must not be negative (cores at least 1)"
            )


@dataclass(frozen=True)
class GpuTarget:
    """One GPU architecture: published ceilings and the per-multiprocessor limits behind occupancy.

    name is the compiler's name of the architecture, chip the product whose peaks are given. `registers` are
    32-bit, per multiprocessor; `register_unit` is the granularity of a warp's allocation per thread.
    `shared_reserved` bytes of every block's share belong to the system.
    """

    name: str
    chip: str
    backend: Literal["cuda", "hip"]
    read_gb_s: float
    f32_gflops: float
    bf16_gflops: float
    int8_gops: float
    launch_us: float
    l2_bytes: int
    l3_bytes: int
    multiprocessors: int
    warp_size: int
    registers: int
    registers_per_thread: int
    register_unit: int
    shared_bytes: int
    shared_bytes_per_block: int
    shared_reserved: int
    threads: int
    threads_per_block: int
    blocks: int

    def ceilings(self) -> Target:
        """The numbers that the cost model reads, as for a CPU."""
        return Target(
            name=self.name,
            read_gb_s=self.read_gb_s,
            f32_gflops=self.f32_gflops,
            bf16_gflops=self.bf16_gflops,
            int8_gops=self.int8_gops,
            launch_us=self.launch_us,
            l2_bytes=self.l2_bytes,
            l3_bytes=self.l3_bytes,
            cores=self.multiprocessors,
        )

    def exceeded(self, registers: int, shared_bytes: int, threads: int) -> str | None:
        """The first limit that a kernel breaks, in words, or None.

        registers per thread, shared_bytes and threads per block.
        """
        if registers > self.registers_per_thread:
            return f"{registers} registers per thread; {self.name} has {self.registers_per_thread}"
        if shared_bytes > self.shared_bytes_per_block:
            most = self.shared_bytes_per_block
            return f"{shared_bytes} bytes of shared memory per block; {self.name} allows {most}"
        if threads > self.threads_per_block:
            return f"{threads} threads per block; {self.name} allows {self.threads_per_block}"
        block = self._warps(threads) * self._registers_per_warp(registers)
        if block > self.registers:
            return f"{block} registers per block; {self.name} has {self.registers} per multiprocessor"
        return None

    def occupancy(self, registers: int, shared_bytes: int, threads: int) -> float:
        """Resident warps over the most that fit on a multiprocessor, 0 to 1; 0 if one block does not fit.

        registers per thread, shared_bytes and threads per block. Source: the arithmetic of NVIDIA's occupancy
        calculator; for CDNA the same with its own units.
        """
        if threads < 1 or self.exceeded(registers, shared_bytes, threads):
            return 0.0
        warps, most_warps = self._warps(threads), self._warps(self.threads)
        by_registers = self.registers // self._registers_per_warp(registers) // warps
        by_shared = self.shared_bytes // max(shared_bytes + self.shared_reserved, 1)
        resident = min(self.blocks, most_warps // warps, by_registers, by_shared)
        return resident * warps / most_warps

    def _warps(self, threads: int) -> int:
        return _round_up(threads, self.warp_size) // self.warp_size

    def _registers_per_warp(self, registers: int) -> int:
        return _round_up(max(registers, 1), self.register_unit) * self.warp_size


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


_KB: Final = 1024
_MB: Final = 1024 * 1024

# XLA's GPU cost model counts 1 to 5 us, 1.3 us was measured inside CUDA graphs on an H100; between them here.
_GPU_LAUNCH_US: Final = 3.0

# Limits of the NVIDIA parts: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# A warp's registers come in units of 256, which is 8 per thread; the system keeps 1 KB of each block's share.
SM_80: Final = GpuTarget(
    name="sm_80",
    chip="A100 SXM 80 GB",
    backend="cuda",
    # NVIDIA A100 data sheet, dense rates: 2,039 GB/s, 19.5 TFLOP/s f32, 312 bf16, 624 TOP/s int8; L2 40 MB.
    read_gb_s=2039.0,
    f32_gflops=19_500.0,
    bf16_gflops=312_000.0,
    int8_gops=624_000.0,
    launch_us=_GPU_LAUNCH_US,
    l2_bytes=40 * _MB,
    l3_bytes=0,
    multiprocessors=108,
    warp_size=32,
    registers=65_536,
    registers_per_thread=255,
    register_unit=8,
    shared_bytes=164 * _KB,
    shared_bytes_per_block=163 * _KB,
    shared_reserved=_KB,
    threads=2048,
    threads_per_block=1024,
    blocks=32,
)

SM_90: Final = GpuTarget(
    name="sm_90",
    chip="H100 SXM 80 GB",
    backend="cuda",
    # NVIDIA H100 data sheet, halved where it counts sparsity: 3.35 TB/s, 67 TFLOP/s f32, 989 bf16,
    # 1,979 TOP/s int8; L2 50 MB and 132 multiprocessors from the H100 architecture paper.
    read_gb_s=3350.0,
    f32_gflops=67_000.0,
    bf16_gflops=989_000.0,
    int8_gops=1_979_000.0,
    launch_us=_GPU_LAUNCH_US,
    l2_bytes=50 * _MB,
    l3_bytes=0,
    multiprocessors=132,
    warp_size=32,
    registers=65_536,
    registers_per_thread=255,
    register_unit=8,
    shared_bytes=228 * _KB,
    shared_bytes_per_block=227 * _KB,
    shared_reserved=_KB,
    threads=2048,
    threads_per_block=1024,
    blocks=32,
)

SM_100: Final = GpuTarget(
    name="sm_100",
    chip="B200",
    backend="cuda",
    # NVIDIA HGX B200 data sheet, halved where it counts sparsity: 7.7 TB/s, 75 TFLOP/s f32, 2,250 bf16,
    # 4,500 TOP/s int8; L2 126 MB and 148 multiprocessors as the driver reports them.
    read_gb_s=7700.0,
    f32_gflops=75_000.0,
    bf16_gflops=2_250_000.0,
    int8_gops=4_500_000.0,
    launch_us=_GPU_LAUNCH_US,
    l2_bytes=126 * _MB,
    l3_bytes=0,
    multiprocessors=148,
    warp_size=32,
    registers=65_536,
    registers_per_thread=255,
    register_unit=8,
    shared_bytes=228 * _KB,
    shared_bytes_per_block=227 * _KB,
    shared_reserved=_KB,
    threads=2048,
    threads_per_block=1024,
    blocks=32,
)

GFX942: Final = GpuTarget(
    name="gfx942",
    chip="MI300X",
    backend="hip",
    # AMD MI300X data sheet, dense rates: 5.3 TB/s, 163.4 TFLOP/s f32, 1,307.4 bf16, 2,614.9 TOP/s int8;
    # 4 MB of L2 on each of 8 dies, 256 MB of Infinity Cache.
    read_gb_s=5300.0,
    f32_gflops=163_400.0,
    bf16_gflops=1_307_400.0,
    int8_gops=2_614_900.0,
    launch_us=_GPU_LAUNCH_US,
    l2_bytes=32 * _MB,
    l3_bytes=256 * _MB,
    multiprocessors=304,
    # CDNA 3 ISA guide: 4 SIMDs, each with 8 waves and 512 registers (vector and accumulation in one file) of
    # 64 lanes, allocated by 8; 64 KB of LDS. 16 blocks: the barriers of a compute unit (LLVM AMDGPUBaseInfo).
    warp_size=64,
    registers=4 * 512 * 64,
    registers_per_thread=512,
    register_unit=8,
    shared_bytes=64 * _KB,
    shared_bytes_per_block=64 * _KB,
    shared_reserved=0,
    threads=2048,
    threads_per_block=1024,
    blocks=16,
)

GPU_TARGETS: Final = (SM_80, SM_90, SM_100, GFX942)


def gpu_target(name: str) -> GpuTarget:
    """The GPU of that compiler name ("sm_90").

    Raises ValueError that lists the known names.
    """
    for target in GPU_TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in GPU_TARGETS)
    raise ValueError(f"unknown GPU target {name!r}: known are {known}")
