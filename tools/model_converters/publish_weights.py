"""Write the weights of a recorded run to weights/, with a card.

python tools/model_converters/publish_weights.py nuclei_long dsnet_dsfpn NAME
"""

import argparse
import sys
from pathlib import Path

from dsnet_mm.engine.launch import user_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/

from evidence.publish import publish
from evidence.runs import Run
from evidence.tables import TABLES


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('table', choices=TABLES)
    parser.add_argument('row')
    parser.add_argument('name', help='name of the files in weights/')
    parser.add_argument(
        '--config',
        type=Path,
        help='configuration that the card names; default: that of the row',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/evidence'))
    parser.add_argument('--overwrite', action='store_true', help='replace the files')
    args = parser.parse_args(argv)
    with user_errors(parser):
        row = TABLES[args.table].row(args.row)
        run = Run(args.table, row, args.seed, args.work_dir.resolve(), None)
        entry = publish(run, args.name, args.config, args.overwrite)
    print(f'Written to weights/. The entry for configs/dsnet/metafile.yml:\n{entry}')


if __name__ == '__main__':
    main()
