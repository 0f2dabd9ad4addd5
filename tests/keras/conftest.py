"""The Keras host's tests run on the backend that KERAS_BACKEND names, each in a process of its own."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
collect_ignore = ["triton_keras.py", "exchanged_run.py"]  # test_on_torch.py runs them in processes of their own
