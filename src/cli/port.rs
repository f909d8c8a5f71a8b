//! The server's port, as flags and the environment tell it.

/// The port where nobody says.
pub(super) const DEFAULT: u16 = 8080;

/// A port. `tcp://10.0.0.1:8080` is what Kubernetes puts into `UNDERSTUDY_PORT` beside a Service named `understudy`; it is
/// no setting, and the default is taken.
pub(super) fn parse(text: &str) -> Result<u16, String> {
    if text.starts_with("tcp://") {
        return Ok(DEFAULT);
    }
    text.parse().map_err(|_| "write a number from 0 to 65535; 0 is any free port".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_says_of_a_service_is_no_setting() {
        assert_eq!(parse("tcp://10.96.12.7:80"), Ok(DEFAULT));
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("65535"), Ok(65_535));
        for wrong in ["", "65536", "-1", "http://10.96.12.7:80", "8080 "] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
