"""The capstone's reference rows, and its hidden texts.

python -m recipes.capstone                     scores every reference recipe of the bundled model
python -m recipes.capstone "70 MB" gptq        one budget, one recipe
python -m recipes.capstone seal stories FILE   seals a text file as the hidden text of that name
"""

import argparse
from pathlib import Path

from quantlab.capstone import REFERENCE, REFERENCES, append, score, write_hidden


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.capstone", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="a budget and names of recipes, or: seal NAME FILE")
    what = parser.parse_args().what
    if what[:1] == ["seal"]:
        _, name, file = what
        print(write_hidden(name, Path(file).read_text(encoding="utf-8")), "bytes")
        return
    for budget in what[:1] or ("2.2 MB", "1.5 MB"):
        for name in what[1:] or REFERENCE[budget]:
            found = score(REFERENCE[budget][name], budget, name=name, who="reference")
            append(found, REFERENCES)
            print(found, flush=True)


if __name__ == "__main__":
    main()
