"""An MCP server written with the SDK, with everything that can go wrong. `python mcp_notes.py [PORT | deaf]`."""

import os
import signal
import sys
import time
from pathlib import Path

from mcp.server.mcpserver import MCPServer
from mcp.types import ImageContent, TextContent

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add_note(text: str) -> str:
    """Add a note."""
    notes.append(text)
    if folder := os.environ.get("PREFLOOP_WORKSPACE"):
        Path(folder, "notes.txt").write_text("\n".join(notes))
    return f"note {len(notes)}"


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def environment() -> dict[str, str]:
    """What the server was started with."""
    return {name: value for name, value in os.environ.items() if name.startswith("PREFLOOP_") or name == "SECRET"}


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no such note")


@server.tool()
def long(num: int) -> str:
    """Say much."""
    return "x" * num


@server.tool()
def picture() -> list[TextContent | ImageContent]:
    """Show something."""
    return [TextContent(type="text", text="See:"), ImageContent(type="image", data="aGk=", mime_type="image/png")]


@server.tool()
def hang() -> str:
    """Never answer."""
    time.sleep(600)
    return ""


@server.tool()
def die() -> str:
    """End the server."""
    print("out of ink", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def chatter() -> str:
    """Print what is no message first."""
    os.write(1, b"this is no JSON\n")
    return "done"


if __name__ == "__main__":
    if pids := os.environ.get("PIDS"):
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\n")
    if sys.argv[1:] == ["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.run()
    elif sys.argv[1:]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
