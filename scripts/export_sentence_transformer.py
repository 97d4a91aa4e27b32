"""The former name of `python3 -m verl.export_sentence_transformer`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("verl.export_sentence_transformer", run_name="__main__", alter_sys=True)
