"""Intel AutoRound: python write_auto_round.py SOURCE SCHEME OUT, round to nearest, its own format"""

import sys

from auto_round import AutoRound

if __name__ == "__main__":  # it starts processes, which import this file
    source, scheme, out = sys.argv[1:]
    model = AutoRound(source, scheme=scheme, iters=0, disable_opt_rtn=True, device_map="cpu")
    model.quantize_and_save(out, format="auto_round")
