"""Which experts are chosen for which token: records, comparison of two policies, replay. Nothing here imports Megatron;
what is attached to its routers is backend/engine/router_hooks.py."""
