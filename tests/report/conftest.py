from __future__ import annotations

import sys
from pathlib import Path

# Test files share fabricated_run.py, which importlib mode does not find by itself.
sys.path.insert(0, str(Path(__file__).parent))
