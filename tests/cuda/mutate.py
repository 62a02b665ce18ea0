"""Breaks the CUDA kernels, one barrier, wait, mask, fence, sign, index or lane at a time: which check notices?

    python -m tests.cuda.mutate [--list] [NAME ...]

A name is an operation or a mutation as the table calls it. The exit code is 1 if a mutation was not noticed that is
not said to be harmless, or one that is was.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.cuda import (
    mutations_additions,
    mutations_arithmetic,
    mutations_edges,
    mutations_losses,
    mutations_mixing,
)
from tests.cuda.mutation import build, noticed_by

MUTATIONS = {
    f"{operation}: {mutation.name}": (operation, mutation)
    for table in (
        mutations_losses.MUTATIONS,
        mutations_additions.MUTATIONS,
        mutations_mixing.MUTATIONS,
        mutations_arithmetic.MUTATIONS,
        mutations_edges.MUTATIONS,
    )
    for operation, mutations in table.items()
    for mutation in mutations
}
CHECKS = {
    operation: mutations_edges.with_edges(operation, check)
    for operation, check in {
        **mutations_losses.CHECKS,
        **mutations_additions.CHECKS,
        **mutations_mixing.CHECKS,
    }.items()
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names of the mutations")
    parser.add_argument("names", nargs="*", help="run only these")
    options = parser.parse_args()
    chosen = {
        name: entry
        for name, entry in MUTATIONS.items()
        if not options.names or name in options.names or entry[0] in options.names
    }
    if options.list:
        print("\n".join(chosen))
        return 0
    for operation in dict.fromkeys(operation for operation, _ in chosen.values()):
        if unharmed := noticed_by(CHECKS[operation], build(operation)):
            print(f"{operation} fails as it is: {unharmed}")
            return 1
    wrong = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        libraries = pool.map(lambda entry: build(*entry), chosen.values())
        for (name, (operation, mutation)), library in zip(chosen.items(), libraries, strict=True):
            found = noticed_by(CHECKS[operation], library)
            expected = (found is None) == bool(mutation.harmless)
            wrong += not expected
            if found is None:
                verdict = f"harmless: {mutation.harmless}" if expected else "NOT NOTICED"
            else:
                verdict = found[:100] if expected else f"SAID TO BE HARMLESS, BUT {found[:100]}"
            print(f"{name:70} {verdict}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
