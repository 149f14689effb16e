#!/usr/bin/env python3
"""A *synthetic* `adb`: `get-state` and `shell -T` as developer.android.com/tools/adb describes them, on this machine.

No device answers here. `SYNTHETIC_ADB_STATE` says what `get-state` finds; serials other than `board` are not there.
"""

import os
import sys


def main() -> int:
    arguments = sys.argv[1:]
    serial = None
    if arguments[:1] == ["-s"]:
        serial, arguments = arguments[1], arguments[2:]
    state = os.environ.get("SYNTHETIC_ADB_STATE", "device")
    if serial not in (None, "board"):
        print(f"error: device '{serial}' not found", file=sys.stderr)
        return 1
    if state != "device":
        print(f"error: {state}", file=sys.stderr)
        return 1
    if arguments == ["get-state"]:
        print("device")
        return 0
    if arguments[:2] == ["shell", "-T"] and len(arguments) == 3:
        os.execv("/bin/sh", ["sh", "-c", arguments[2]])
    print(f"adb: unknown command {arguments}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
