"""The former name of `python3 -m verl.get_demo_model`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("verl.get_demo_model", run_name="__main__", alter_sys=True)
