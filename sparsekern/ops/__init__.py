"""The ops that users call: checks, registration with torch, autograd, dispatch."""
