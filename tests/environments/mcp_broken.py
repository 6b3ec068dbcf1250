"""A server of no SDK, whose results are none: what it answers to a call is its first argument."""

import json
import sys

for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("method") == "initialize":
        version = asked["params"]["protocolVersion"]
        result = {
            "protocolVersion": version,
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "b", "version": "1"},
        }
    elif asked.get("method") == "tools/list":
        result = {"tools": [{"name": "look", "inputSchema": {"type": "object"}}]}
    elif asked.get("method") == "tools/call":
        result = json.loads(sys.argv[1])
    else:
        error = {"code": -32601, "message": "no such method"}
        if "id" in asked:
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
