"""An agent on LangGraph: a model that may call a tool, and a node that runs it; who trains its model it knows not."""

import os
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from stock import look_up

TOOLS = [tool(look_up)]

# Address and key are in OPENAI_BASE_URL and OPENAI_API_KEY.
model = ChatOpenAI(model=os.environ.get("MODEL", "policy")).bind_tools(TOOLS)


def think(state: MessagesState) -> dict:
    """Ask the model for its next message."""
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("think", think)
graph.add_node("tools", ToolNode(TOOLS))
graph.add_edge(START, "think")
graph.add_conditional_edges("think", tools_condition)
graph.add_edge("tools", "think")
agent = graph.compile()

if __name__ == "__main__":
    state = agent.invoke({"messages": [("user", sys.argv[1])]}, {"recursion_limit": 12})
    print(state["messages"][-1].content)
