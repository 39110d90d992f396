"""Trust: which images may be used, by policy.json (containers-policy.json(5)) and the signatures that it asks for.

Here belong the rules and all that judges a signature.  How to speak to a registry is `images.registry`'s; when an image
is judged is the store's business.

    judging        the way in: the policy that counts, and what it says of one image
    policy         policy.json, parsed strictly
    rules          each kind of requirement, and how it judges
    identities     signedIdentity: whether a signature is about this name
    signatures     a signature as data: its two kinds, and the payloads that are signed
    fetching       signatures of a registry, a lookaside store, a directory
    registries_d   where they are (containers-registries.d(5))
    gpg            OpenPGP, by gpgv
    sigstore       keys, certificates and the transparency log
    documents      strict JSON
"""
