"""What the processes of a run exchange: the job, orders, records, heartbeats, environment variables."""
