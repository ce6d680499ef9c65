"""Write src/ssmtrain/config/schema.json from the models; --check only says whether it is stale (exit 1)."""

from __future__ import annotations

import sys

from ssmtrain.config import schema_file


def main() -> int:
    """Write or check the file."""
    text = schema_file.text()
    current = schema_file.FILE.read_text(encoding="utf-8") if schema_file.FILE.exists() else ""
    if "--check" in sys.argv[1:]:
        print("schema.json is up to date" if text == current else "schema.json is stale: make schema")
        return int(text != current)
    schema_file.FILE.write_text(text, encoding="utf-8")
    print(f"wrote {schema_file.FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
