"""Secrets made up for tests, none of which stands in a file: every pattern has one, drawn from a generator."""

import base64
import json
import random
import string

ALNUM = string.ascii_letters + string.digits


def secrets(random_seed: int = 0) -> dict[str, str]:
    """By the name of a pattern and of a form, the whole text as it would stand in a file."""
    draw = random.Random(random_seed)

    def text(n: int, letters: str = ALNUM) -> str:
        return "".join(draw.choice(letters) for _ in range(n))

    def encoded(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    def key(kind: str, n_lines: int = 4) -> str:
        body = "\n".join(text(64, ALNUM + "+/") for _ in range(n_lines))
        return f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----"

    upper, hexadecimal = string.ascii_uppercase + string.digits, "0123456789abcdef"
    mixed = "aB3" + text(40)
    return {
        "private-key/pkcs8": key("PRIVATE KEY"),
        "private-key/rsa": key("RSA PRIVATE KEY"),
        "private-key/ec": key("EC PRIVATE KEY"),
        "private-key/dsa": key("DSA PRIVATE KEY"),
        "private-key/encrypted": key("ENCRYPTED PRIVATE KEY"),
        "private-key/openssh": key("OPENSSH PRIVATE KEY"),
        "private-key/pgp": key("PGP PRIVATE KEY BLOCK"),
        "private-key/escaped": json.dumps({"private_key": key("PRIVATE KEY")}),
        "private-key/old": key("RSA PRIVATE KEY").replace("-----\n", "-----\nProc-Type: 4,ENCRYPTED\n\n", 1),
        "aws-access-key/akia": "AKIA" + text(16, upper),
        "aws-access-key/asia": "ASIA" + text(16, upper),
        "aws-secret-key/env": "AWS_SECRET_ACCESS_KEY=aB3" + text(37, ALNUM + "+/"),
        "aws-secret-key/json": '"SecretAccessKey": "aB3' + text(37, ALNUM + "+/") + '"',
        "google-api-key": "AIza" + text(35),
        "slack-token/bot": "xoxb-" + text(12, string.digits) + "-" + text(24),
        "slack-token/user": "xoxp-" + text(12, string.digits) + "-" + text(24),
        "github-token/personal": "ghp_" + text(36),
        "github-token/app": "ghs_" + text(36),
        "github-token/oauth": "gho_" + text(36),
        "github-token/user": "ghu_" + text(36),
        "github-token/refresh": "ghr_" + text(36),
        "github-token/fine": "github_pat_" + text(22) + "_" + text(59),
        "gitlab-token": "glpat-" + text(20),
        "npm-token": "npm_" + text(36),
        "hugging-face-token": "hf_" + text(34),
        "stripe-key/secret": "sk_live_" + text(24),
        "stripe-key/restricted": "rk_live_" + text(24),
        "sendgrid-key": "SG." + text(22) + "." + text(43),
        "model-api-key/plain": "sk-" + mixed,
        "model-api-key/project": "sk-proj-" + mixed,
        "json-web-token": f"{encoded({'alg': 'HS256'})}.{encoded({'sub': text(12)})}.{text(43)}",
        "url-password/postgres": f"postgres://app:{text(14)}@db.internal/app",
        "url-password/redis": f"redis://:{text(14)}@cache:6379/0",
        "url-password/https": f"https://deploy:{text(14)}@git.internal/x.git",
        "azure-storage-key": "AccountKey=" + text(86, ALNUM + "+/") + "==",
        "gcp-service-account": f'"private_key_id": "{text(40, hexadecimal)}"',
        "wandb-key/env": "WANDB_API_KEY=" + text(40, hexadecimal),
        "wandb-key/yaml": "wandb_key: " + text(40, hexadecimal),
        "assigned-secret/python": f'password = "{"q7" + text(18)}"',
        "assigned-secret/yaml": f"api_key: z9{text(18)}",
        "assigned-secret/json": f'{{"client_secret": "r2D2{text(18)}"}}',
        "assigned-secret/shell": f"export DB_PASSWORD=m3{text(18)}",
    }


def lookalikes(random_seed: int = 0) -> list[str]:
    """Two hundred texts and more that look like secrets to a careless pattern, and are none."""
    draw = random.Random(random_seed)

    def text(n: int, letters: str = ALNUM) -> str:
        return "".join(draw.choice(letters) for _ in range(n))

    fixed = [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "ghp_" + "x" * 36,
        "ghp_short",
        "hf_hub_download(repo_id, filename)",
        "hf_" + "transformers_model_config_with_long_name",
        "sk-fading-circle-container-with-many-dots",
        "sk-estimator-doc-link-wrapper-of-a-page",
        "npm_config_registry=local",
        "npm_lifecycle_event_of_a_package_manager_1",
        "AIza-short",
        "xoxb-your-token-here",
        "glpat-" + "x" * 20,
        "postgres://user:password@localhost/db",
        "postgres://user:${DB_PASSWORD}@localhost/db",
        "postgres://{user}:{password}@{host}/{name}",
        "https://example.org:8080/@scope/name",
        "http://localhost:8000/v1/chat/completions",
        "password = getpass.getpass()",
        "password = os.environ['DB_PASSWORD']",
        'password = "hunter2"',
        'password: "correct horse battery staple"',
        "password = settings.database.password_2",
        "api_key = config.get_api_key_v2()",
        "api_key: YOUR_API_KEY_HERE_1234",
        "api_key=<your key here>",
        'secret = "changeme-changeme-123"',
        "secret_sharing_scheme = shamir_secret_sharing_2_of_3",
        "client_secret: ${{ secrets.CLIENT_SECRET_2 }}",
        "auth_token = base64.b64encode(b'aladdin')",
        "passwd: files systemd-passwd-1",
        "-----BEGIN CERTIFICATE-----\n" + text(64) + "\n-----END CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----\n" + text(64) + "\n-----END PUBLIC KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
        "it begins with -----BEGIN PRIVATE KEY----- and ends with -----END PRIVATE KEY-----",
        "AccountKey=<key>;EndpointSuffix=core",
        "eyJhbGciOi.not.a-token-at-all",
        "WANDB_PROJECT=meristem-runs-2026",
        '"private_key_id": "..."',
    ]
    drawn = [f"sha256:{text(64, '0123456789abcdef')}" for _ in range(40)]
    drawn += [f"commit {text(40, '0123456789abcdef')}" for _ in range(40)]
    drawn += [f'"integrity": "sha512-{text(86)}=="' for _ in range(30)]
    drawn += [f"{text(8)}-{text(4)}-4{text(3)}-a{text(3)}-{text(12)}" for _ in range(30)]
    drawn += [f"src='data:image/png;base64,{text(200)}'" for _ in range(30)]
    return [*fixed, *drawn]
