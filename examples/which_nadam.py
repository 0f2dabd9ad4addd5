"""Which Nadam is in each library that is installed here? Every one of them through nadam.conformance.

    python examples/which_nadam.py              # all that is installed, and this package on each host
    python examples/which_nadam.py optax timm   # rows whose names contain one of the words
    KERAS_BACKEND=jax python examples/which_nadam.py keras.

docs/which.md has the table, with what to make of it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings

from nadams import ROWS

from nadam.conformance import identify


def show(row):
    try:
        found = str(identify(row.make))
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"not run: {error}"
    version = getattr(sys.modules.get(row.library), "__version__", None) or importlib.metadata.version(row.library)
    print(f"{row.name} ({row.library} {version}): {found}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only rows whose names contain one of these")
    parser.add_argument("--library", help="only rows of this one, in this process")
    args = parser.parse_args()
    if args.library:
        warnings.simplefilter("ignore")
    for library in dict.fromkeys(row.library for row in ROWS):
        rows = [r for r in ROWS if r.library == library and (not args.words or any(w in r.name for w in args.words))]
        if args.library == library:
            for row in rows:
                show(row)
        elif not args.library and rows and importlib.util.find_spec(library):
            # A process for each: TensorFlow and PyTorch, for one, do not load after each other in every order.
            backend = {"KERAS_BACKEND": "tensorflow"} if library in ("tensorflow", "tf_keras") else {}
            command = [sys.executable, __file__, "--library", library, *args.words]
            subprocess.run(command, env={**os.environ, **backend}, stderr=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main()
