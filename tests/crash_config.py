"""The stream of test_run.py as a config file, for the main command in crash.py."""

import test_run

CONFIG = test_run.make(eval__fwt=True)
