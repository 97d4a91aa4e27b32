"""The former name of `python3 -m verl.eval_generation`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("verl.eval_generation", run_name="__main__", alter_sys=True)
