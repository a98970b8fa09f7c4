"""What a worker says of its parts while it runs them: the `event` of each line of its file."""

READY, BEGUN, FINDING, ENDED = "ready", "begun", "finding", "ended"
