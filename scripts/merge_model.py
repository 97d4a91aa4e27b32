"""The name under which the original GRACE's eval.sh calls `python3 -m verl.merge_model`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("verl.merge_model", run_name="__main__", alter_sys=True)
