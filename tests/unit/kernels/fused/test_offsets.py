"""Places in memory are 64 bits wide in the kernels of the loss head, of the pages and of the staging blocks.

113,360 tokens x 18,944 columns are 2^31 entries; no tensor of that size is needed to see what type a product has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

# As far as Triton's own code, before any pass of the compiler: that is where the types are decided.
SOURCES = """
import json
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from headrace.helpers import kernel_builds as builds
target = GPUTarget("cuda", 90, 32)
backend, context, found = make_backend(target), ir.context(), {}
ir.load_dialects(context)
backend.load_dialects(context)
options = backend.parse_options({})
for build in (*builds.loss_builds(), *builds.pages_builds()):
    if build.name.endswith(("fp16]", "fp32]")):
        continue
    names = build.kernel.arg_names
    source = ASTSource(build.kernel, {n: build.signature.get(n, "constexpr") for n in names}, dict(build.constexprs))
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    found[build.name] = str(source.make_ir(target, options, *helpers, context))
print(json.dumps(found))
"""
# Factors of the 32-bit products there may be: the place of a step within one row.
SMALL = ("%tile,", "%step,", "%part,", "%first_tiles,", "%line_")


def wide_and_narrow(code: str) -> tuple[int, list[str]]:
    """How many 64-bit products there are, and the 32-bit ones that are not of SMALL factors."""
    products = re.findall(r"arith\.muli (.*) : (?:tensor<[0-9x]*x)?(i\d+)", code)
    narrow = [factors for factors, kind in products if kind == "i32" and not factors.startswith(SMALL)]
    return sum(kind == "i64" for _, kind in products), narrow


def test_products_of_rows_are_64_bits_wide() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SOURCES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout.splitlines()[-1])
    assert len(sources) == 7
    for name, code in sources.items():
        num_wide, narrow = wide_and_narrow(code)
        assert num_wide >= 2, name
        assert not narrow, (name, narrow)


def test_a_product_of_a_row_in_32_bits_is_seen() -> None:
    code = "%rows_1 = arith.muli %rows, %rows_0 : tensor<32xi32> loc(#loc)\n%x = arith.muli %y, %z : i64"
    assert wide_and_narrow(code) == (1, ["%rows, %rows_0"])
