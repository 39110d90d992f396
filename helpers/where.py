"""Print, as C, where this interpreter is and where it finds crio_native and what that imports."""

import json
import os
import site
import sys

import crio_native

packages = [os.path.dirname(os.path.dirname(os.path.abspath(crio_native.__file__))), *site.getsitepackages()]
known = [path for path in dict.fromkeys(packages) if os.path.isdir(path)]
print(f"#define PYTHON {json.dumps(os.path.realpath(sys.executable))}")
print(f"#define PACKAGES {json.dumps(repr(known))}")
