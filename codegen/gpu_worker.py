"""Compile printed kernels ahead of time, in a process of its own: `python -m torchweld.codegen.gpu_worker < request`.

The request is JSON on standard input, one job per list element; one JSON line per job goes to standard output as soon
as it is done.  A process of its own, because Triton is either an interpreter or a compiler for as long as it is
loaded, and because a compiler that crashes must not take the caller with it.  Triton's own cache returns damaged
files as good, so the caller points TRITON_CACHE_DIR to an empty private folder.
"""

# mypy: ignore-errors
# Triton is untyped; the protocol is checked where the answers are read (gpu_build.py).

import base64
import importlib.util
import json
import sys
from pathlib import Path


def compile_job(job: dict) -> dict:
    """Compile one kernel for one target: assembly as text, the binary in base 64, shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    spec = importlib.util.spec_from_file_location(Path(job["module"]).stem, job["module"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import triton.language as tl

    constexprs = {name: getattr(tl, value) for name, value in job["constexprs"].items()}
    signature = {**job["signature"], **dict.fromkeys(constexprs, "constexpr")}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in job["aligned"]}
    source = triton.compiler.ASTSource(
        fn=getattr(module, job["entry"]), signature=signature, constexprs=constexprs, attrs=attrs
    )
    target = GPUTarget(job["backend"], job["arch"], job["warp_size"])
    compiled = triton.compile(
        source, target=target, options={"num_warps": job["warps"], "num_stages": job["stages"]}
    )
    text, binary = ("ptx", "cubin") if job["backend"] == "cuda" else ("amdgcn", "hsaco")
    return {
        "assembly": compiled.asm[text],
        "binary": base64.b64encode(compiled.asm[binary]).decode(),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    """Answer every job of the request; a job that fails answers with its error."""
    for job in json.load(sys.stdin):
        try:
            answer = compile_job(job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:4000]}
        print(json.dumps({"id": job["id"], **answer}), flush=True)


if __name__ == "__main__":
    main()
