"""Whether each source is the checkpoint that its folder says, by evidence from several places.

No single sign proves it, so each is weighed where it is certain:

* where it stands: iteration and samples, beside those of the other sources (`consumed_samples`);
* its weights are its own main params, rounded once (`rounded`);
* what training changes in every step differs from that of every other source (`copies`);
* every file goes on where the same file of its neighbour stood (`lineage`).
"""
