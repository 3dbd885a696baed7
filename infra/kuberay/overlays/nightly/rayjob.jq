# The suspended template as a RayJob that runs, without the fields that belong to the template object itself.
{
  apiVersion,
  kind,
  metadata: {name: "tcan-preprocess-nightly", namespace: .metadata.namespace},
  spec: (.spec | del(.suspend))
}
