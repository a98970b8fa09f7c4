"""Loss spikes: where one began, what was healthy before it, how to go on."""
