"""From a request to a published average: plan, sum, verification, report."""
