"""When things happen: Prefect flows, deployments, servers and the command line."""
