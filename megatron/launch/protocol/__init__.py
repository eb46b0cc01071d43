"""What the processes of a run tell each other: the job, records, heartbeats, environment variables."""
