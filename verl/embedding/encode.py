"""The former name of `python3 -m verl.encoder`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("verl.encoder", run_name="__main__", alter_sys=True)
