"""Print, as C, where this interpreter is, where it finds crio_native and what that imports, and where archives are."""

import json
import os
import site
import sys


def packages() -> list[str]:
    import crio_native

    root = os.path.dirname(os.path.dirname(os.path.abspath(crio_native.__file__)))
    return [path for path in dict.fromkeys([root, *site.getsitepackages()]) if os.path.isdir(path)]


if __name__ == "__main__":
    archives = f"{os.path.abspath(sys.argv[1])!r} + '.' + sys.implementation.cache_tag"
    print(f"#define PYTHON {json.dumps(os.path.realpath(sys.executable))}")
    print(f"#define PACKAGES {json.dumps(repr(packages()))}")
    print(f"#define ARCHIVES {json.dumps(archives)}")
